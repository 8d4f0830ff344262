//! The images of a job: what is trained on, what is held out, and of which class each is. Pixels stay in their files until a
//! micro-batch needs them.

mod batches;
mod cifar10;
mod folders;
mod pixels;

use std::fs::Metadata;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use fusionllm_protocol::{
    DataFingerprint, DataFormat, DataReport, DataSpec, FileFingerprint, TokenizerFingerprint, content_hash,
};
use fusionllm_transport::is_shortage;

use super::files::{LeftOut, TextFile, shown, text_files};
use super::fingerprint::fingerprint;
use super::readable::ReadableData;
use super::reading::Reading;
use crate::DataError;
pub use batches::ImageBatches;
use pixels::Picture;

/// Longest file of one image.
const MOST_BYTES: u64 = 256 << 20;
/// Classes that are named where they are listed.
const NAMED_CLASSES: usize = 12;

/// An image, and its class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    /// Its file.
    file: u32,
    /// Which record of a file of many it is.
    record: u32,
    class: u32,
}

/// All images of a job.
#[derive(Clone, Debug)]
pub struct ImageSet {
    format: DataFormat,
    is_private: bool,
    paths: Vec<PathBuf>,
    train: Vec<Entry>,
    eval: Vec<Entry>,
    classes: Vec<String>,
    readable: ReadableData,
    files: Vec<FileFingerprint>,
    /// Of files of which a part is read at a time; none of others.
    stamps: Vec<Stamp>,
    notes: Vec<String>,
}

/// What a form of data is read into.
#[derive(Debug, Default)]
struct Found {
    paths: Vec<PathBuf>,
    train: Vec<Entry>,
    eval: Vec<Entry>,
    classes: Vec<String>,
    files: Vec<FileFingerprint>,
    stamps: Vec<Stamp>,
}

/// What looks at files.
#[derive(Clone, Copy)]
struct Look<'a> {
    spec: &'a DataSpec,
    readable: &'a ReadableData,
    reading: &'a Reading,
}

impl ImageSet {
    /// Reads every image of `spec.path` once, to know that all of them can be read. Of each class the last `eval_fraction`
    /// is held out, by the order of the paths; of CIFAR-10, its test batch.
    ///
    /// # Errors
    /// [`DataError`] that names the file which is no image, is of no class or cannot be read, or what is missing.
    pub fn read(spec: &DataSpec, reading: &Reading) -> Result<Self, DataError> {
        Self::read_within(spec, &ReadableData::everything(), reading)
    }

    /// The same for a job of somebody else, who may have read only what is `readable`, and may stop it.
    ///
    /// # Errors
    /// As [`Self::read`], and [`DataError::NotReadable`] or [`DataError::Stopped`].
    pub(crate) fn read_within(spec: &DataSpec, readable: &ReadableData, reading: &Reading) -> Result<Self, DataError> {
        readable.check(spec)?;
        let mut left_out = LeftOut::new(spec.private);
        // Any name may be that of a class.
        let files = text_files(&spec.path, &[], &mut left_out, reading)?;
        let look = Look { spec, readable, reading };
        let found = match spec.format {
            DataFormat::Cifar10 => cifar10::read(look, files, &mut left_out)?,
            _ => folders::read(look, files, &mut left_out)?,
        };
        let Found { paths, train, eval, classes, files, stamps } = found;
        let (format, readable, notes) = (spec.format, readable.clone(), left_out.notes());
        let is_private = spec.private;
        Ok(Self { format, is_private, paths, train, eval, classes, readable, files, stamps, notes })
    }

    /// Holds the classes against those of the model. Says what must be known otherwise.
    ///
    /// # Errors
    /// [`DataError::Classes`] if the model has fewer.
    pub fn check_classes(&self, classes: usize) -> Result<Option<String>, DataError> {
        let found = self.classes.len();
        if found > classes {
            return Err(DataError::Classes { found, classes });
        }
        if found == 1 {
            return Ok(Some("the data has images of one class: there is nothing to tell apart".to_owned()));
        }
        let note = || format!("the data has images of {found} classes, the model tells {classes} apart");
        Ok((found < classes).then(note))
    }

    /// Names of the classes, by number.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// How many images there are to train on, and held out.
    pub fn len(&self) -> (usize, usize) {
        (self.train.len(), self.eval.len())
    }

    /// Counts, and the loss on the held-out images of a model that knows only how often each class comes.
    pub fn report(&self) -> DataReport {
        let mut counts = vec![1.0f64; self.classes.len().max(1)];
        self.train.iter().for_each(|entry| counts[entry.class as usize] += 1.0);
        let total: f64 = counts.iter().sum();
        let nats = |entry: &Entry| -(counts[entry.class as usize] / total).ln();
        let unigram_loss = self.eval.iter().map(nats).sum::<f64>() / self.eval.len() as f64;
        let notes = self.named_classes().into_iter().chain(self.notes.iter().cloned()).collect();
        DataReport {
            files: self.files.len() as u64,
            train_tokens: self.train.len() as u64,
            eval_tokens: self.eval.len() as u64,
            bytes_per_token: 0.0,
            unigram_loss,
            classes: Some(self.classes.len() as u64),
            notes,
            fingerprint: Some(self.fingerprint()),
        }
    }

    /// The classes in a sentence; of private data, names stay with its owner.
    fn named_classes(&self) -> Option<String> {
        let mut named: Vec<String> = self.classes.iter().take(NAMED_CLASSES).map(|name| format!("`{name}`")).collect();
        let more = self.classes.len() - named.len();
        named.extend((more > 0).then(|| format!("{more} more")));
        (!self.is_private).then(|| format!("{} classes: {}", self.classes.len(), named.join(", ")))
    }

    fn fingerprint(&self) -> DataFingerprint {
        let names = self.classes.join("\n");
        let tokenizer = TokenizerFingerprint {
            name: DataFingerprint::CLASSES.to_owned(),
            entries: self.classes.len() as u64,
            hash: content_hash(names.as_bytes()),
        };
        fingerprint(&self.files, tokenizer)
    }

    /// The pixels of an image.
    fn picture(&self, entry: Entry) -> Result<Picture, DataError> {
        let index = entry.file as usize;
        let path = &self.paths[index];
        let shown = || if self.is_private { PathBuf::from(&self.files[index].name) } else { path.clone() };
        let fail = |source: std::io::Error| failed(&shown(), source);
        // Its class is that of what the file held at the start.
        let changed =
            || DataError::Path { path: shown(), reason: "has changed since training began with it".to_owned() };
        let mut file = self.readable.open(path).map_err(fail)?;
        if self.format == DataFormat::Cifar10 {
            if file.metadata().map_err(fail).map(|metadata| Stamp::of(&metadata))? != self.stamps[index] {
                return Err(changed());
            }
            let mut record = [0; cifar10::RECORD];
            let start = u64::from(entry.record) * cifar10::RECORD as u64;
            file.seek(SeekFrom::Start(start)).and_then(|_| file.read_exact(&mut record)).map_err(fail)?;
            return Ok(cifar10::picture(&record));
        }
        let mut bytes = Vec::new();
        file.take(MOST_BYTES).read_to_end(&mut bytes).map_err(fail)?;
        if content_hash(&bytes) != self.files[index].hash {
            return Err(changed());
        }
        Picture::decode(&bytes).map_err(|reason| DataError::Path { path: shown(), reason })
    }
}

/// By what a file that is written to, or another one in its place, is told from what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    modified: Option<SystemTime>,
    /// Device, number, and when either was last changed, where the system tells.
    place: [i128; 4],
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        #[cfg(unix)]
        let place = {
            use std::os::unix::fs::MetadataExt;
            [metadata.dev().into(), metadata.ino().into(), metadata.ctime().into(), metadata.ctime_nsec().into()]
        };
        #[cfg(not(unix))]
        let place = [0; 4];
        Self { bytes: metadata.len(), modified: metadata.modified().ok(), place }
    }
}

/// That a file could not be read.
fn failed(path: &Path, source: std::io::Error) -> DataError {
    match is_shortage(&source) {
        true => DataError::Unopened { what: "data.path", source },
        false => DataError::Path { path: path.to_owned(), reason: source.to_string() },
    }
}

/// A file for people: of private data only what the job names is called by its name.
fn for_people(file: &TextFile, spec: &DataSpec) -> PathBuf {
    if spec.private && !file.named { shown(&file.name, true).into() } else { file.path.clone() }
}

/// The number of a file or record.
fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
