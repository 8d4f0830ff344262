//! Copies of the fixtures in this folder. Tests of more than one crate include this file by its path.

use std::path::Path;

/// Copies the fixture `name` to the folder `to`. Where `here` is given, it replaces `/fixture` in the texts.
pub(crate) fn copy_fixture(name: &str, to: &Path, here: Option<&str>) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests");
    copy(&fixtures.join(name), to, here);
}

fn copy(from: &Path, to: &Path, here: Option<&str>) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_dir() {
            copy(&from, &to, here);
            continue;
        }
        let bytes = std::fs::read(&from).unwrap();
        let replaced =
            here.and_then(|here| Some(std::str::from_utf8(&bytes).ok()?.replace("/fixture", here).into_bytes()));
        std::fs::write(&to, replaced.unwrap_or(bytes)).unwrap();
    }
}
