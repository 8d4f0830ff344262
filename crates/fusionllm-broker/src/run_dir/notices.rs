//! `notices.jsonl`: a line for each thing that the user must see.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};

use fusionllm_protocol::Notice;
use fusionllm_transport::io_reason;

use crate::line_writer::LineWriter;
use crate::metrics::each_line;

/// Notices that a report shows, the last ones.
const NOTICES_SHOWN: usize = 1000;
/// Lines that wait for room on the disk are at most this much; later ones are left out, and counted.
const MAX_WAITING_BYTES: usize = 1 << 20;

/// Appends notices. What cannot be written waits until it can: it is no reason for a job to fail.
#[derive(Debug)]
pub(crate) struct NoticesWriter {
    path: PathBuf,
    lines: Option<LineWriter>,
    waiting: Vec<u8>,
    /// Notices that were left out since something was last written, and the step of the last.
    left_out: (u64, u64),
}

impl NoticesWriter {
    /// Nothing is opened before there is something to write.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, lines: None, waiting: Vec::new(), left_out: (0, 0) }
    }

    /// Appends a notice. Gives why it has to wait, if this is the first one that does.
    pub(crate) fn append(&mut self, notice: &Notice) -> Option<String> {
        let is_first = self.waiting.is_empty();
        let line = match line(notice) {
            Ok(line) => line,
            Err(error) => return Some(format!("{}: {error}", self.path.display())),
        };
        if self.waiting.len() + line.len() <= MAX_WAITING_BYTES {
            self.waiting.extend(line);
        } else {
            self.left_out = (self.left_out.0 + 1, notice.step);
        }
        let error = self.flush().err().filter(|_| is_first)?;
        let error = io_reason(&error);
        Some(format!("{}: {error}: notices wait until they can be written", self.path.display()))
    }

    /// The lines of their file; nothing before the first one.
    pub(crate) fn lines(&mut self) -> Option<&mut LineWriter> {
        self.lines.as_mut()
    }

    /// Goes on in a file of this path, with all notices so far, and writes what waits.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn move_to(&mut self, path: PathBuf) -> io::Result<()> {
        self.path = path;
        if let Some(lines) = &mut self.lines {
            lines.move_to(&self.path)?;
        }
        self.flush()
    }

    /// Writes what waits, and how many notices there was no room for.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.write()?;
        let (count, step) = std::mem::take(&mut self.left_out);
        if count == 0 {
            return Ok(());
        }
        let notices = if count == 1 { "1 notice is".to_owned() } else { format!("{count} notices are") };
        let text = format!("{notices} left out: for too long there was no room to write them");
        self.waiting.extend(line(&Notice { step, text })?);
        self.write()
    }

    fn write(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let lines = match &mut self.lines {
            Some(lines) => lines,
            None => self.lines.insert(LineWriter::open(&self.path)?),
        };
        lines.write(&mut self.waiting)
    }
}

/// A notice as it is written.
fn line(notice: &Notice) -> serde_json::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(notice)?;
    line.push(b'\n');
    Ok(line)
}

/// The last notices, oldest first; none if there is no file. The last of them says what could not be read, at `step`.
pub(crate) fn read_notices(path: &Path, step: u64) -> Vec<Notice> {
    let (mut notices, mut unreadable) = (VecDeque::new(), 0u64);
    let read = each_line(path, |line| {
        match serde_json::from_slice::<Notice>(line) {
            Ok(notice) => notices.push_back(notice),
            Err(_) => unreadable += 1,
        }
        if notices.len() > NOTICES_SHOWN {
            notices.pop_front();
        }
    });
    let trouble = match (read, unreadable) {
        (Err(error), _) => Some(format!("earlier notices cannot be read: {error}")),
        (Ok(()), 0) => None,
        (Ok(()), 1) => Some(format!("{} has 1 line that is not readable: it is left out", path.display())),
        (Ok(()), count) => {
            Some(format!("{} has {count} lines that are not readable: they are left out", path.display()))
        }
    };
    notices.extend(trouble.map(|text| Notice { step, text }));
    notices.into()
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write;

    use super::*;

    fn notice(step: u64, text: &str) -> Notice {
        Notice { step, text: text.to_owned() }
    }

    #[test]
    fn notices_are_kept_and_damaged_ones_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notices.jsonl");
        assert_eq!(read_notices(&path, 0), []);
        let mut writer = NoticesWriter::new(path.clone());
        let (first, second) = (notice(0, "weights: new"), notice(5, "line\nbreak"));
        assert_eq!((writer.append(&first), writer.append(&second)), (None, None));
        // A crash has torn the last one.
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"step\":7,").unwrap();
        assert_eq!(read_notices(&path, 9), [first.clone(), second.clone()]);
        let third = notice(8, "after it");
        NoticesWriter::new(path.clone()).append(&third);
        assert_eq!(read_notices(&path, 9), [first.clone(), second, third.clone()]);
        let damaged = std::fs::read_to_string(&path).unwrap().replacen("\"step\":5", "\"step\":!", 1);
        std::fs::write(&path, damaged).unwrap();
        let read = read_notices(&path, 9);
        assert_eq!((&read[..2], read[2].step), (&[first, third][..], 9));
        assert!(read[2].text.ends_with("notices.jsonl has 1 line that is not readable: it is left out"), "{read:?}");
    }

    #[test]
    fn what_is_in_the_way_is_said_and_fails_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notices.jsonl");
        std::fs::create_dir(&path).unwrap();
        let mut writer = NoticesWriter::new(path.clone());
        let said = writer.append(&notice(1, "one")).unwrap();
        assert!(said.contains("notices.jsonl") && said.contains("wait until they can be written"), "{said}");
        assert_eq!(writer.append(&notice(2, "two")), None, "it is said once");
        assert!(read_notices(&path, 3)[0].text.starts_with("earlier notices cannot be read: "));
        std::fs::remove_dir(&path).unwrap();
        assert_eq!(writer.append(&notice(3, "three")), None);
        assert_eq!(read_notices(&path, 3), [notice(1, "one"), notice(2, "two"), notice(3, "three")]);
    }

    #[test]
    fn notices_that_are_left_out_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notices.jsonl");
        std::fs::create_dir(&path).unwrap();
        let mut writer = NoticesWriter::new(path.clone());
        let long = "x".repeat(MAX_WAITING_BYTES / 4);
        for step in 1..=6 {
            writer.append(&notice(step, &long));
        }
        std::fs::remove_dir(&path).unwrap();
        writer.flush().unwrap();
        writer.append(&notice(7, "seven"));
        let read = read_notices(&path, 7);
        assert_eq!(read.iter().map(|notice| notice.step).collect::<Vec<_>>(), [1, 2, 3, 6, 7]);
        assert_eq!(read[3].text, "3 notices are left out: for too long there was no room to write them");
    }

    /// Room for a part of a line is the worst: it must not spoil the next one.
    #[cfg(target_os = "linux")]
    #[test]
    fn half_a_line_on_a_full_disk_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notices.jsonl");
        let mut writer = NoticesWriter::new(path.clone());
        assert_eq!(writer.append(&notice(1, "one")), None);
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let length = std::fs::metadata(&path).unwrap().len();
        writer.lines = Some(LineWriter::new(full, length));
        assert!(writer.append(&notice(2, "two")).unwrap().contains("No space left on device"));
        // What the disk took of it.
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"step\":2,").unwrap();
        if let Some(lines) = &mut writer.lines {
            lines.set_file(file);
        }
        assert_eq!(writer.append(&notice(3, "three")), None);
        assert_eq!(read_notices(&path, 3), [notice(1, "one"), notice(2, "two"), notice(3, "three")]);
    }
}
