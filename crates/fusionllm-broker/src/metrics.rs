//! `metrics.jsonl`: one line a step.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use fusionllm_protocol::StepMetrics;

use crate::BrokerError;
use crate::run_dir::{io_error, write_atomic};

/// Appends lines; each is on its way to the disk before the next one comes.
#[derive(Debug)]
pub(crate) struct MetricsWriter {
    file: File,
}

impl MetricsWriter {
    /// Opens the file and drops what lies after `start_step`: those steps will be done again.
    pub(crate) fn open(path: &Path, start_step: u64) -> Result<Self, BrokerError> {
        if path.exists() {
            let kept: Vec<StepMetrics> =
                read_metrics(path)?.into_iter().take_while(|metrics| metrics.step <= start_step).collect();
            let mut text = Vec::new();
            for metrics in &kept {
                text.extend(line(path, metrics)?);
            }
            write_atomic(path, &text)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(|e| io_error(path, e))?;
        Ok(Self { file })
    }

    /// Appends one step.
    pub(crate) fn append(&mut self, path: &Path, metrics: &StepMetrics) -> Result<(), BrokerError> {
        let line = line(path, metrics)?;
        // One write, so that a reader never sees half a line but at a crash.
        self.file.write_all(&line).and_then(|()| self.file.flush()).map_err(|e| io_error(path, e))
    }
}

fn line(path: &Path, metrics: &StepMetrics) -> Result<Vec<u8>, BrokerError> {
    let mut line = serde_json::to_vec(metrics).map_err(|e| io_error(path, e.into()))?;
    line.push(b'\n');
    Ok(line)
}

/// All whole lines of a metrics file; none if there is no file. A torn last line, from a crash, is passed over.
pub(crate) fn read_metrics(path: &Path) -> Result<Vec<StepMetrics>, BrokerError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(io_error(path, e)),
    };
    let mut metrics = Vec::new();
    for line in BufReader::new(file).lines() {
        let line = line.map_err(|e| io_error(path, e))?;
        match serde_json::from_str(&line) {
            Ok(step) => metrics.push(step),
            Err(_) => break,
        }
    }
    Ok(metrics)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn steps(path: &Path) -> Vec<u64> {
        read_metrics(path).unwrap().iter().map(|m| m.step).collect()
    }

    #[test]
    fn a_resumed_run_drops_what_it_will_do_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::open(&path, 0).unwrap();
        for step in 1..=5 {
            writer.append(&path, &testing::metrics(step, 2.0)).unwrap();
        }
        assert_eq!(steps(&path), [1, 2, 3, 4, 5]);
        let mut writer = MetricsWriter::open(&path, 3).unwrap();
        writer.append(&path, &testing::metrics(4, 1.0)).unwrap();
        assert_eq!(steps(&path), [1, 2, 3, 4]);
        assert!((read_metrics(&path).unwrap()[3].loss - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_torn_last_line_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        MetricsWriter::open(&path, 0).unwrap().append(&path, &testing::metrics(1, 2.0)).unwrap();
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\":2,").unwrap();
        assert_eq!(steps(&path), [1]);
        MetricsWriter::open(&path, 9).unwrap().append(&path, &testing::metrics(2, 2.0)).unwrap();
        assert_eq!(steps(&path), [1, 2]);
    }
}
