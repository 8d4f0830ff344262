//! Files of whole lines that grow for as long as a run lasts, while others may cut, rename, remove or replace them.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use fusionllm_transport::{FileMode, folder_of, io_reason, leads_to, sync_folder, temporary_for};
use tempfile::NamedTempFile;

use crate::files::put_aside;

/// So often a file is written again at once that others replace again and again; each time what they put there is kept.
const MOST_AT_ONCE: u32 = 10;

/// Appends whole lines to a file, or nothing.
#[derive(Debug)]
pub(crate) struct LineWriter {
    file: File,
    /// Bytes of whole lines in the file.
    length: u64,
    /// Whether the file may end with half a line.
    is_torn: bool,
    /// Whether the file is not under its name, and cannot be written there again.
    is_elsewhere: bool,
    /// How often it was written again at once.
    times: u32,
}

impl LineWriter {
    /// Goes on after the first `length` bytes, and drops what lies behind them before it writes.
    pub(crate) fn new(file: File, length: u64) -> Self {
        Self { file, length, is_torn: true, is_elsewhere: false, times: 0 }
    }

    /// Opens a file after its last whole line, and makes it if it is not there.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        let length = whole_lines(&mut file)?;
        Ok(Self::new(file, length))
    }

    /// Writes and takes what waits: one write, so that a reader never sees half a line but at a crash.
    pub(crate) fn write(&mut self, waiting: &mut Vec<u8>) -> io::Result<()> {
        let there = self.file.metadata()?.len();
        if there > self.length {
            if self.is_torn {
                self.file.set_len(self.length)?;
            } else {
                // Others have appended to it: that stays, and must not spoil the next line.
                self.length = there;
                if whole_lines(&mut self.file)? < there {
                    waiting.insert(0, b'\n');
                }
            }
        }
        self.is_torn = true;
        if let Err(error) = self.file.write_all(waiting) {
            // Half a line would end the file for every reader; what cannot be cut off now is before the next attempt.
            let _ = self.file.set_len(self.length);
            return Err(error);
        }
        self.is_torn = false;
        self.length += waiting.len() as u64;
        waiting.clear();
        Ok(())
    }

    /// Waits until all that was written is on the disk.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Whether a path leads to this file.
    pub(crate) fn is_at(&self, path: &Path) -> bool {
        leads_to(path, &self.file)
    }

    /// Looks what others have done to the file of this path, and puts it right: what was renamed, removed or replaced is
    /// written again with all lines, and what came in its place is kept. Gives what its user must know, once.
    pub(crate) fn look(&mut self, path: &Path) -> Option<String> {
        if self.is_at(path) {
            self.is_elsewhere = false;
            let lost = self.cut().ok().filter(|&lost| lost > 0)?;
            return Some(format!(
                "{} was cut short by somebody else: {lost} bytes of its lines are lost",
                path.display()
            ));
        }
        if self.is_elsewhere {
            return None;
        }
        if self.times >= MOST_AT_ONCE {
            self.is_elsewhere = true;
            return Some(format!(
                "{} was replaced {MOST_AT_ONCE} times: it is written again with the next checkpoint and at the end",
                path.display()
            ));
        }
        self.times += 1;
        let (mut aside, mut lost) = (Vec::new(), 0);
        let mut write_again = || {
            lost = self.cut()?;
            aside = self.move_to(path)?;
            Ok(())
        };
        let result: io::Result<()> = write_again();
        self.is_elsewhere = result.is_err();
        let became = match result {
            Ok(()) if lost > 0 => format!("it is written again, but for {lost} bytes that were cut from it"),
            Ok(()) => "it is written again, with all that was in it".to_owned(),
            Err(error) => format!(
                "it cannot be written again ({}), which is tried once more with the next checkpoint and at the end",
                io_reason(&error)
            ),
        };
        let kept: Vec<String> = aside.iter().map(|to| to.display().to_string()).collect();
        let aside = match kept.is_empty() {
            true => String::new(),
            false => format!("; what came in its place is kept as {}", kept.join(", ")),
        };
        Some(format!("{} was renamed, removed or replaced: {became}{aside}", path.display()))
    }

    /// Has the next [`Self::look`] try again what could not be done.
    pub(crate) fn try_again(&mut self) {
        (self.is_elsewhere, self.times) = (false, self.times.min(MOST_AT_ONCE - 1));
    }

    /// If others have cut the file, goes on after its last whole line. Gives how many bytes of lines are lost.
    fn cut(&mut self) -> io::Result<u64> {
        let there = self.file.metadata()?.len();
        if there >= self.length {
            return Ok(0);
        }
        let whole = whole_lines(&mut self.file)?;
        if whole < there {
            self.file.set_len(whole)?;
        }
        let lost = self.length - whole;
        self.length = whole;
        Ok(lost)
    }

    /// Goes on in a file of this path, with all lines so far. Gives where what was there is now.
    pub(crate) fn move_to(&mut self, path: &Path) -> io::Result<Vec<PathBuf>> {
        if self.is_at(path) {
            return Ok(Vec::new());
        }
        let mut temporary = temporary_for(path, FileMode::Shared)?;
        self.file.seek(SeekFrom::Start(0))?;
        io::copy(&mut Read::take(&self.file, self.length), temporary.as_file_mut())?;
        temporary.as_file().sync_all()?;
        let file = OpenOptions::new().read(true).append(true).open(temporary.path())?;
        let aside = named_whole(temporary, path)?;
        sync_folder(folder_of(path))?;
        self.file = file;
        self.is_torn = true;
        Ok(aside)
    }

    #[cfg(test)]
    pub(crate) fn set_file(&mut self, file: File) {
        self.file = file;
    }
}

/// Gives a file its name. What has that, or gets it in this very moment, is put aside: gives where it is.
fn named_whole(mut file: NamedTempFile, path: &Path) -> io::Result<Vec<PathBuf>> {
    /// So often something may come in its place.
    const ATTEMPTS: usize = 10;
    let mut aside = Vec::new();
    loop {
        if path.symlink_metadata().is_ok() {
            aside.push(put_aside(path)?);
        }
        match file.persist_noclobber(path) {
            Ok(_) => return Ok(aside),
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists && aside.len() < ATTEMPTS => {
                file = error.file;
            }
            Err(error) => return Err(error.error),
        }
    }
}

/// Bytes up to the last line end.
fn whole_lines(file: &mut File) -> io::Result<u64> {
    const PART_BYTES: u64 = 64 << 10;
    let mut end = file.metadata()?.len();
    while end > 0 {
        let start = end.saturating_sub(PART_BYTES);
        let mut part = Vec::new();
        file.seek(SeekFrom::Start(start))?;
        file.take(end - start).read_to_end(&mut part)?;
        if let Some(at) = part.iter().rposition(|&byte| byte == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(folder: &Path) -> (std::path::PathBuf, LineWriter) {
        let path = folder.join("x.jsonl");
        let mut lines = LineWriter::open(&path).unwrap();
        lines.write(&mut b"one\ntwo\n".to_vec()).unwrap();
        (path, lines)
    }

    fn text(path: &Path) -> String {
        std::fs::read_to_string(path).unwrap()
    }

    #[cfg(unix)]
    #[test]
    fn what_comes_in_the_place_is_kept_and_told_once() {
        for kind in ["file", "folder", "link"] {
            let folder = tempfile::tempdir().unwrap();
            let (path, mut lines) = written(folder.path());
            assert_eq!(lines.look(&path), None);
            std::fs::rename(&path, folder.path().join("went")).unwrap();
            match kind {
                "file" => std::fs::write(&path, "mine").unwrap(),
                "folder" => std::fs::create_dir(&path).unwrap(),
                _ => std::os::unix::fs::symlink("nowhere", &path).unwrap(),
            }
            let told = lines.look(&path).unwrap();
            assert!(told.contains("with all that was in it; what came in its place is kept as "), "{told}");
            assert!(told.ends_with("x.jsonl.other"), "{told}");
            assert_eq!(lines.look(&path), None);
            lines.write(&mut b"three\n".to_vec()).unwrap();
            assert_eq!(text(&path), "one\ntwo\nthree\n");
            let other = folder.path().join("x.jsonl.other");
            assert!(other.symlink_metadata().is_ok() && (kind != "file" || text(&other) == "mine"));
        }
    }

    /// As by a program that rewrites it every second: what it leaves must not fill the disk.
    #[test]
    fn what_is_replaced_again_and_again_is_kept_a_few_times() {
        let folder = tempfile::tempdir().unwrap();
        let (path, mut lines) = written(folder.path());
        let replace = |lines: &mut LineWriter| {
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, "mine").unwrap();
            lines.look(&path)
        };
        for _ in 0..MOST_AT_ONCE {
            assert!(replace(&mut lines).unwrap().contains("it is written again"));
        }
        assert!(replace(&mut lines).unwrap().contains("was replaced 10 times"));
        assert_eq!(replace(&mut lines), None);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), MOST_AT_ONCE as usize + 1);
        lines.write(&mut b"three\n".to_vec()).unwrap();
        lines.try_again();
        assert!(replace(&mut lines).unwrap().contains("it is written again"));
        assert_eq!(text(&path), "one\ntwo\nthree\n");
    }

    #[test]
    fn a_file_that_was_cut_goes_on_after_its_last_whole_line_and_that_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let (path, mut lines) = written(folder.path());
        OpenOptions::new().write(true).open(&path).unwrap().set_len(6).unwrap();
        let told = lines.look(&path).unwrap();
        assert!(told.ends_with("x.jsonl was cut short by somebody else: 4 bytes of its lines are lost"), "{told}");
        assert_eq!(lines.look(&path), None);
        lines.write(&mut b"three\n".to_vec()).unwrap();
        assert_eq!(text(&path), "one\nthree\n");
    }

    #[test]
    fn what_others_append_spoils_no_line() {
        let folder = tempfile::tempdir().unwrap();
        let (path, mut lines) = written(folder.path());
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"theirs").unwrap();
        assert_eq!(lines.look(&path), None);
        lines.write(&mut b"three\n".to_vec()).unwrap();
        assert_eq!(text(&path), "one\ntwo\ntheirs\nthree\n");
        lines.write(&mut b"four\n".to_vec()).unwrap();
        assert_eq!(text(&path), "one\ntwo\ntheirs\nthree\nfour\n");
    }

    #[cfg(unix)]
    #[test]
    fn what_cannot_be_written_again_is_told_once_and_tried_later() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let (path, mut lines) = written(&inner);
        let away = folder.path().join("away");
        std::fs::rename(&inner, &away).unwrap();
        let told = lines.look(&path).unwrap();
        assert!(told.contains("it cannot be written again (No such file or directory"), "{told}");
        assert_eq!(lines.look(&path), None);
        lines.write(&mut b"three\n".to_vec()).unwrap();
        std::fs::create_dir(&inner).unwrap();
        lines.try_again();
        assert!(lines.look(&path).unwrap().ends_with("with all that was in it"));
        assert_eq!(text(&path), "one\ntwo\nthree\n");
    }
}
