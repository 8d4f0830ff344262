//! A small disk of a test's own.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Tells whoever runs the tests, also of a test that passes.
fn say(text: &str) {
    // Without a terminal nobody listens.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// A disk that ends with the test.
pub(crate) struct Disk(PathBuf);

impl Disk {
    /// Makes one of `kib` KiB in a new folder; nothing where the user of the tests may mount none, which is said.
    pub(crate) fn mount(at: PathBuf, kib: u32) -> Option<Self> {
        std::fs::create_dir(&at).unwrap();
        let size = format!("size={kib}k,mode=700");
        let why = match Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&at).output() {
            Ok(output) if output.status.success() => return Some(Self(at)),
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => format!("mount: {error}"),
        };
        say(&format!("skipped, for want of a small disk: {why}"));
        None
    }

    /// Its folder.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Fills it, until [`Self::make_room`].
    pub(crate) fn fill(&self) {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(self.ballast()).unwrap();
        for size in [1 << 16, 1 << 12, 1] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
    }

    /// Takes away what fills it.
    pub(crate) fn make_room(&self) {
        std::fs::remove_file(self.ballast()).unwrap();
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Whoever still has files there has been killed, and is about to go.
        for _ in 0..100 {
            let umount = Command::new("umount").arg(&self.0).output();
            if umount.is_ok_and(|output| output.status.success()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        say(&format!("{} stays mounted", self.0.display()));
    }
}
