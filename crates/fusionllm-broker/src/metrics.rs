//! `metrics.jsonl`: one line a step. It grows for as long as a run lasts, so it is never read as a whole.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use fusionllm_protocol::{Recovery, StepMetrics};
use fusionllm_transport::{io_reason, open_regular};
use serde::Deserialize;

use crate::BrokerError;
use crate::files::io_error;
use crate::line_writer::LineWriter;

/// A longer line is no line of ours.
const MAX_LINE_BYTES: u64 = 16 << 20;
/// Lines that wait for room on the disk are at most this much.
const MAX_WAITING_BYTES: usize = 64 << 20;

/// Appends lines; each is on its way to the disk before the next one comes. On a full disk lines wait until there is
/// room.
#[derive(Debug)]
pub(crate) struct MetricsWriter {
    lines: LineWriter,
    waiting: Vec<u8>,
    /// What lines told that were dropped, as their steps are done again: the next line tells it.
    carried: Vec<Recovery>,
    /// Whether no line was written yet.
    begins: bool,
}

impl MetricsWriter {
    /// Opens the file and drops what lies after `start_step`: those steps will be done again.
    pub(crate) fn open(path: &Path, start_step: u64) -> Result<Self, BrokerError> {
        let fail = |e| io_error(path, e);
        let length = bytes_up_to(path, start_step)?;
        let carried = recoveries_behind(path, length)?;
        let file = OpenOptions::new().read(true).create(true).append(true).open(path).map_err(fail)?;
        if file.metadata().map_err(fail)?.len() != length {
            file.set_len(length).and_then(|()| file.sync_all()).map_err(fail)?;
        }
        Ok(Self { lines: LineWriter::new(file, length), waiting: Vec::new(), carried, begins: true })
    }

    /// Appends one step, with the time. Gives why it has to wait, if this is the first one that does.
    pub(crate) fn append(&mut self, path: &Path, metrics: &StepMetrics) -> Result<Option<String>, BrokerError> {
        let is_first = self.waiting.is_empty();
        let mut line = metrics.clone();
        line.unix_s = SystemTime::now().duration_since(UNIX_EPOCH).ok().map(|since| since.as_millis() as f64 / 1e3);
        line.starts = std::mem::take(&mut self.begins) && metrics.recoveries.is_empty();
        line.recoveries.splice(0..0, std::mem::take(&mut self.carried));
        serde_json::to_writer(&mut self.waiting, &line).map_err(|e| io_error(path, e.into()))?;
        self.waiting.push(b'\n');
        match self.flush() {
            Ok(()) => Ok(None),
            Err(e) if self.waiting.len() > MAX_WAITING_BYTES => Err(io_error(path, e)),
            Err(e) => {
                let reason = io_reason(&e);
                Ok(is_first.then(|| format!("{}: {reason}: its lines wait until they can be written", path.display())))
            }
        }
    }

    /// The lines of its file.
    pub(crate) fn lines(&mut self) -> &mut LineWriter {
        &mut self.lines
    }

    /// Whether no line waits.
    pub(crate) fn is_written(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Goes on in a file of this path, with all lines so far.
    ///
    /// # Errors
    /// [`BrokerError::Io`] that names it.
    pub(crate) fn move_to(&mut self, path: &Path) -> Result<(), BrokerError> {
        self.lines.move_to(path).map(drop).map_err(|e| io_error(path, e))
    }

    /// Writes what waits, and has all on the disk.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        self.flush()?;
        self.lines.sync()
    }

    /// Writes what waits.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() { Ok(()) } else { self.lines.write(&mut self.waiting) }
    }
}

/// Reads lines of a bounded length.
struct Lines<R> {
    reader: R,
    line: Vec<u8>,
}

impl<R: BufRead> Lines<R> {
    /// The next line with its end; nothing at the end of the file, and where a line has no end or is too long.
    fn next(&mut self) -> io::Result<Option<&[u8]>> {
        self.line.clear();
        (&mut self.reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut self.line)?;
        Ok(self.line.ends_with(b"\n").then_some(&self.line))
    }
}

fn open(path: &Path) -> Result<Option<File>, BrokerError> {
    match open_regular(path) {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io_error(path, e)),
    }
}

/// The one key of a line that says where it belongs.
#[derive(Deserialize)]
struct Step {
    step: u64,
}

/// How many bytes of the file belong to the steps up to `step`. Lines that are not readable belong to the step before.
fn bytes_up_to(path: &Path, step: u64) -> Result<u64, BrokerError> {
    let Some(file) = open(path)? else { return Ok(0) };
    let mut lines = Lines { reader: BufReader::new(file), line: Vec::new() };
    let (mut bytes, mut read) = (0, 0);
    while let Some(line) = lines.next().map_err(|e| io_error(path, e))? {
        read += line.len() as u64;
        match serde_json::from_slice::<Step>(line) {
            Ok(found) if found.step <= step => bytes = read,
            Ok(_) => break,
            Err(_) => {}
        }
    }
    Ok(bytes)
}

/// Whether a file has whole lines of which none is that of a step: it is somebody else's.
pub(crate) fn has_no_step(path: &Path) -> bool {
    let Ok(Some(file)) = open(path) else { return false };
    let mut lines = Lines { reader: BufReader::new(file), line: Vec::new() };
    let mut is_empty = true;
    while let Ok(Some(line)) = lines.next() {
        if serde_json::from_slice::<Step>(line).is_ok() {
            return false;
        }
        is_empty = false;
    }
    !is_empty
}

/// The recoveries that lines tell behind the first `bytes` bytes.
fn recoveries_behind(path: &Path, bytes: u64) -> Result<Vec<Recovery>, BrokerError> {
    let fail = |e| io_error(path, e);
    let Some(mut file) = open(path)? else { return Ok(Vec::new()) };
    file.seek(SeekFrom::Start(bytes)).map_err(fail)?;
    let mut found = Vec::new();
    each_of(BufReader::new(file), |step| found.extend(step.recoveries)).map_err(fail)?;
    Ok(found)
}

/// Copies what lies after `step` to a file of its own, if there is anything.
pub(crate) fn copy_after(path: &Path, step: u64, to: &Path) -> Result<(), BrokerError> {
    let Some(mut file) = open(path)? else { return Ok(()) };
    let start = bytes_up_to(path, step)?;
    let fail = |e| io_error(path, e);
    if file.metadata().map_err(fail)?.len() > start {
        file.seek(SeekFrom::Start(start)).map_err(fail)?;
        let copy = |mut to: File| io::copy(&mut file, &mut to).and_then(|_| to.sync_all());
        OpenOptions::new().write(true).create_new(true).open(to).and_then(copy).map_err(|e| io_error(to, e))?;
    }
    Ok(())
}

/// Step and loss of the last whole line; nothing if there is none.
pub(crate) fn last_step(path: &Path) -> Option<(u64, f64)> {
    // A line has the links and their codecs: many times as long as this it never is.
    const TAIL_BYTES: u64 = 1 << 20;
    let mut file = open_regular(path).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES))).ok()?;
    let mut tail = Vec::new();
    file.read_to_end(&mut tail).ok()?;
    let step = |line: &[u8]| serde_json::from_slice::<StepMetrics>(line).ok().map(|m| (m.step, m.loss));
    tail.rsplit(|&byte| byte == b'\n').find_map(step)
}

/// Of how many steps a metrics file has figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Figures {
    last: u64,
    steps: u64,
    /// Whole lines that are not readable.
    pub(crate) unreadable: u64,
}

impl Figures {
    fn step(&mut self, step: u64) {
        if step > self.last {
            self.last = step;
            self.steps += 1;
        }
    }

    /// Steps after `start` and up to `end` of which there are none.
    pub(crate) fn missing(&self, start: u64, end: u64) -> u64 {
        end.saturating_sub(start).saturating_sub(self.steps)
    }
}

/// Hands out the whole lines of a metrics file one by one; none if there is no file. Lines that are not readable are
/// counted, but for a torn last one from a crash.
pub(crate) fn each_step(path: &Path, take: impl FnMut(StepMetrics)) -> Result<Figures, BrokerError> {
    match open(path)? {
        Some(file) => each_of(BufReader::new(file), take).map_err(|e| io_error(path, e)),
        None => Ok(Figures::default()),
    }
}

fn each_of(reader: impl BufRead, mut take: impl FnMut(StepMetrics)) -> io::Result<Figures> {
    let mut lines = Lines { reader, line: Vec::new() };
    let mut figures = Figures::default();
    while let Some(line) = lines.next()? {
        match serde_json::from_slice::<StepMetrics>(line) {
            Ok(step) => {
                figures.step(step.step);
                take(step);
            }
            Err(_) => figures.unreadable += 1,
        }
    }
    Ok(figures)
}

/// What a metrics file does not tell of the steps after `start` and up to `end`, for its user; nothing if it tells all.
/// Hands out its steps as [`each_step`] does.
pub(crate) fn gaps(
    path: &Path,
    start: u64,
    end: u64,
    take: impl FnMut(StepMetrics),
) -> Result<Option<String>, BrokerError> {
    let figures = each_step(path, take)?;
    // Without what changes from start to start, so that it is said once.
    let missing = match figures.missing(start, end) {
        0 => None,
        1 => Some("no figures of 1 step".to_owned()),
        missing => Some(format!("no figures of {missing} steps")),
    };
    let unreadable = match figures.unreadable {
        0 => None,
        1 => Some("1 line that is not readable".to_owned()),
        unreadable => Some(format!("{unreadable} lines that are not readable")),
    };
    let found: Vec<String> = missing.into_iter().chain(unreadable).collect();
    if found.is_empty() {
        return Ok(None);
    }
    let is_one = found.len() == 1 && figures.missing(start, end) + figures.unreadable == 1;
    let them = if is_one { "it" } else { "them" };
    Ok(Some(format!("{} has {}: the report goes without {them}", path.display(), found.join(" and "))))
}

/// Hands out the whole lines of a file one by one; none if there is no file.
pub(crate) fn each_line(path: &Path, mut take: impl FnMut(&[u8])) -> Result<(), BrokerError> {
    let Some(file) = open(path)? else { return Ok(()) };
    let mut lines = Lines { reader: BufReader::new(file), line: Vec::new() };
    while let Some(line) = lines.next().map_err(|e| io_error(path, e))? {
        take(line);
    }
    Ok(())
}

/// Values of a series of any length, evenly spread, of which a bounded number is kept.
#[derive(Clone, Debug)]
pub(crate) struct Thinned<T> {
    values: Vec<T>,
    limit: usize,
    /// Every so many values one is kept.
    every: u64,
    seen: u64,
}

impl<T> Thinned<T> {
    /// Keeps all of up to `limit` values, and between half of it and `limit` of more.
    pub(crate) fn new(limit: usize) -> Self {
        Self { values: Vec::new(), limit: limit.max(2), every: 1, seen: 0 }
    }

    pub(crate) fn push(&mut self, value: T) {
        if self.seen.is_multiple_of(self.every) {
            if self.values.len() == self.limit {
                let mut index = 0;
                self.values.retain(|_| {
                    index += 1;
                    index % 2 == 1
                });
                self.every *= 2;
            }
            if self.seen.is_multiple_of(self.every) {
                self.values.push(value);
            }
        }
        self.seen += 1;
    }

    pub(crate) fn values(&self) -> &[T] {
        &self.values
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::testing;

    fn steps(path: &Path) -> Vec<u64> {
        let mut steps = Vec::new();
        each_step(path, |m| steps.push(m.step)).unwrap();
        steps
    }

    fn five_steps(path: &Path) {
        let mut writer = MetricsWriter::open(path, 0).unwrap();
        for step in 1..=5 {
            writer.append(path, &testing::metrics(step, 2.0)).unwrap();
        }
    }

    #[test]
    fn a_resumed_run_drops_what_it_will_do_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        five_steps(&path);
        assert_eq!(steps(&path), [1, 2, 3, 4, 5]);
        let aside = folder.path().join("aside.jsonl");
        copy_after(&path, 3, &aside).unwrap();
        let mut writer = MetricsWriter::open(&path, 3).unwrap();
        writer.append(&path, &testing::metrics(4, 1.0)).unwrap();
        assert_eq!(steps(&path), [1, 2, 3, 4]);
        assert_eq!(steps(&aside), [4, 5]);
        let mut last = None;
        each_step(&path, |m| last = Some(m.loss)).unwrap();
        assert!((last.unwrap() - 1.0).abs() < 1e-12);
    }

    /// The lines that told of a recovery go, and what they told does not.
    #[test]
    fn what_was_recovered_from_is_told_though_its_line_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let recovery = |step| Recovery {
            kind: fusionllm_protocol::Fault::Lost,
            who: vec!["b".to_owned()],
            step,
            lost_steps: 1,
            compnodes: 1,
            detect_s: 4.0,
            decide_s: 0.0,
            build_s: 0.0,
            refill_s: 0.0,
        };
        let told = || {
            let mut told = Vec::new();
            let mut add = |m: StepMetrics| told.push((m.step, m.starts, m.recoveries.iter().map(|r| r.step).collect()));
            each_step(&path, &mut add).unwrap();
            told
        };
        let append = |start, step, recoveries| {
            let metrics = StepMetrics { recoveries, ..testing::metrics(step, 2.0) };
            MetricsWriter::open(&path, start).unwrap().append(&path, &metrics).unwrap();
        };
        append(0, 1, vec![]);
        append(1, 2, vec![recovery(5)]);
        append(1, 2, vec![recovery(7)]);
        assert_eq!(told(), [(1, true, vec![]), (2, false, vec![5, 7])]);
        append(2, 3, vec![]);
        assert_eq!(told()[2], (3, true, vec![]), "what stays is told once");
        let mut times = Vec::new();
        each_step(&path, |m| times.push(m.unix_s.unwrap())).unwrap();
        assert!(times.iter().all(|&unix_s| unix_s > 1.7e9), "{times:?}");
    }

    #[test]
    fn a_torn_last_line_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        MetricsWriter::open(&path, 0).unwrap().append(&path, &testing::metrics(1, 2.0)).unwrap();
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\":2,").unwrap();
        assert_eq!(steps(&path), [1]);
        assert_eq!((last_step(&path), last_step(folder.path())), (Some((1, 2.0)), None));
        MetricsWriter::open(&path, 9).unwrap().append(&path, &testing::metrics(2, 2.0)).unwrap();
        assert_eq!(steps(&path), [1, 2]);
    }

    #[test]
    fn steps_without_figures_are_counted_however_they_were_lost() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let rest = |said: String| said.split_once("metrics.jsonl has ").unwrap().1.to_owned();
        let told = |start, end| rest(gaps(&path, start, end, |_| {}).unwrap().unwrap());
        assert_eq!(told(0, 3), "no figures of 3 steps: the report goes without them", "there is no file");
        assert_eq!(gaps(&path, 3, 3, |_| {}).unwrap(), None);
        five_steps(&path);
        assert_eq!(gaps(&path, 0, 5, |_| {}).unwrap(), None);
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        std::fs::write(&path, format!("{}\n{}\n{}{}\n", lines[0], lines[0], lines[2], lines[3])).unwrap();
        assert_eq!(told(0, 5), "no figures of 4 steps and 1 line that is not readable: the report goes without them");
        // A run that began with a checkpoint of step 3.
        std::fs::write(&path, format!("{}\n", lines[4])).unwrap();
        assert_eq!(told(3, 5), "no figures of 1 step: the report goes without it");
        std::fs::write(&path, format!("{}\n!\n!\n", lines[4])).unwrap();
        assert_eq!(told(4, 5), "2 lines that are not readable: the report goes without them");
    }

    #[test]
    fn a_damaged_line_costs_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        five_steps(&path);
        let damaged = std::fs::read_to_string(&path).unwrap().replacen("\"step\":2", "\"step\":!", 1);
        std::fs::write(&path, damaged).unwrap();
        assert_eq!(steps(&path), [1, 3, 4, 5]);
        let said = gaps(&path, 0, 5, |_| {}).unwrap().unwrap();
        assert!(said.contains("no figures of 1 step and 1 line that is not readable: the report"), "{said}");
        MetricsWriter::open(&path, 4).unwrap();
        assert_eq!(steps(&path), [1, 3, 4]);
    }

    /// A reader of `lines` lines that counts what its buffer hands out at most at a time.
    struct Endless {
        line: Vec<u8>,
        left: usize,
        at: usize,
    }

    impl Read for Endless {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            if self.at == self.line.len() {
                self.left = self.left.saturating_sub(1);
                self.at = 0;
            }
            if self.left == 0 {
                return Ok(0);
            }
            let count = into.len().min(self.line.len() - self.at);
            into[..count].copy_from_slice(&self.line[self.at..self.at + count]);
            self.at += count;
            Ok(count)
        }
    }

    #[test]
    fn a_long_file_is_read_line_by_line_and_a_line_without_end_is_not() {
        let mut line = serde_json::to_vec(&testing::metrics(1, 2.0)).unwrap();
        line.push(b'\n');
        let (longest, lines) = (line.len(), 200_000);
        let mut reader = Lines { reader: BufReader::new(Endless { line, left: lines, at: 0 }), line: Vec::new() };
        let mut read = 0;
        while reader.next().unwrap().is_some() {
            read += 1;
        }
        assert_eq!(read, lines);
        assert!(reader.line.capacity() < 4 * longest, "{} bytes are held", reader.line.capacity());
        let mut endless = Lines {
            reader: BufReader::new(Endless { line: vec![b' '; 1 << 16], left: usize::MAX, at: 0 }),
            line: vec![],
        };
        assert_eq!(endless.next().unwrap(), None);
        assert!(endless.line.capacity() <= 2 * MAX_LINE_BYTES as usize);
    }

    #[test]
    fn a_thinned_series_keeps_every_nth_value() {
        let mut series = Thinned::new(8);
        (0..8).for_each(|i| series.push(i));
        assert_eq!(series.values(), [0, 1, 2, 3, 4, 5, 6, 7]);
        (8..1000).for_each(|i| series.push(i));
        assert!((4..=8).contains(&series.values().len()), "{series:?}");
        let gaps: Vec<i32> = series.values().windows(2).map(|w| w[1] - w[0]).collect();
        assert!(gaps.windows(2).all(|w| w[0] == w[1]), "{series:?}");
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_was_removed_or_replaced_is_written_again_with_all_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::open(&path, 0).unwrap();
        for step in 1..=3 {
            writer.append(&path, &testing::metrics(step, 2.0)).unwrap();
            assert!(writer.lines().is_at(&path));
            std::fs::remove_file(&path).unwrap();
            if step == 2 {
                std::fs::write(&path, "another").unwrap();
            }
            assert!(!writer.lines().is_at(&path));
            writer.move_to(&path).unwrap();
        }
        assert_eq!(steps(&path), [1, 2, 3]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
        assert_eq!(std::fs::read(folder.path().join("metrics.jsonl.other")).unwrap(), b"another");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn lines_wait_while_the_disk_is_full() {
        let path = Path::new("/dev/full");
        let file = OpenOptions::new().write(true).open(path).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().join("metrics.jsonl");
        let mut writer =
            MetricsWriter { lines: LineWriter::new(file, 0), waiting: Vec::new(), carried: Vec::new(), begins: true };
        let notice = writer.append(path, &testing::metrics(1, 2.0)).unwrap().unwrap();
        assert!(notice.contains("No space left on device"), "{notice}");
        assert_eq!(writer.append(path, &testing::metrics(2, 2.0)).unwrap(), None, "it is said once");
        let file = OpenOptions::new().read(true).create(true).append(true).open(&real).unwrap();
        writer.lines().set_file(file);
        assert_eq!(writer.append(&real, &testing::metrics(3, 2.0)).unwrap(), None);
        assert_eq!(steps(&real), [1, 2, 3]);
    }
}
