//! CIFAR-10 in its binary form (Krizhevsky, 2009): a byte with the class and 3072 with the pixels, image after image.

use std::io::Read;

use fusionllm_protocol::{ContentHasher, FileFingerprint};

use super::pixels::Picture;
use super::{Entry, Found, Look, Stamp, failed, for_people, number};
use crate::DataError;
use crate::data::files::{LeftOut, TextFile, shown};

const SIDE: usize = 32;
/// Bytes of an image.
pub(super) const RECORD: usize = 1 + 3 * SIDE * SIDE;
/// What the classes mean, as `batches.meta.txt` has it.
const CLASSES: [&str; 10] = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"];
/// How the names of files begin, of which the first ones have a number.
const TRAIN: &str = "data_batch_";
const EVAL: &str = "test_batch";
/// Records that are read at once.
const PART: usize = 256;

/// The picture of a record.
pub(super) fn picture(record: &[u8; RECORD]) -> Picture {
    Picture::of_planes(&record[1..], SIDE)
}

/// Reads the classes of all images.
pub(super) fn read(look: Look<'_>, files: Vec<TextFile>, left_out: &mut LeftOut) -> Result<Found, DataError> {
    // What follows `start` in the name. A copy beside a file must not count twice.
    let after = |file: &TextFile, start: &str| {
        let name = file.path.file_name().and_then(|name| name.to_str())?;
        name.strip_prefix(start)?.strip_suffix(".bin").map(str::to_owned)
    };
    let mut found = Found { classes: CLASSES.map(str::to_owned).to_vec(), ..Found::default() };
    let sizes = files.iter().filter_map(|file| std::fs::metadata(&file.path).ok());
    look.reading.begins(sizes.map(|size| size.len()).sum());
    for file in files {
        let is_held_out = after(&file, EVAL).is_some_and(|rest| rest.is_empty());
        if !is_held_out && after(&file, TRAIN).is_none_or(|number| number.parse::<u32>().is_err()) {
            left_out.add("neither data_batch_1.bin and so on nor test_batch.bin", &file.name);
            continue;
        }
        let index = number(found.paths.len());
        let (classes, hash, stamp) = classes_of(look, &file)?;
        let entries = (0..).zip(&classes).map(|(record, &class)| Entry { file: index, record, class: class.into() });
        if is_held_out {
            found.eval.extend(entries)
        } else {
            found.train.extend(entries)
        }
        let bytes = (classes.len() * RECORD) as u64;
        let (name, train_bytes) = (shown(&file.name, look.spec.private), if is_held_out { 0 } else { bytes });
        found.files.push(FileFingerprint { name, bytes, train_bytes, hash });
        found.paths.push(file.path);
        found.stamps.push(stamp);
    }
    let paths = || look.spec.path.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join("; ");
    match (found.train.is_empty(), found.eval.is_empty()) {
        (true, _) => Err(DataError::NoText { what: format!("{TRAIN}1.bin and so on of CIFAR-10"), paths: paths() }),
        (_, true) => Err(DataError::NoText { what: format!("{EVAL}.bin of CIFAR-10"), paths: paths() }),
        _ => Ok(found),
    }
}

/// The class of each image of a file, the hash of its content, and by what a change of it is known.
fn classes_of(look: Look<'_>, file: &TextFile) -> Result<(Vec<u8>, String, Stamp), DataError> {
    let path = for_people(file, look.spec);
    let wrong = |reason: String| DataError::Path { path: path.clone(), reason };
    let mut open = look.readable.open(&file.path).map_err(|e| failed(&path, e))?;
    // Before what is read, so that a change meanwhile is seen too.
    let stamp = open.metadata().map(|metadata| Stamp::of(&metadata)).map_err(|e| failed(&path, e))?;
    let (mut classes, mut hash, mut part) = (Vec::new(), ContentHasher::default(), Vec::new());
    loop {
        part.clear();
        let read = open.by_ref().take((PART * RECORD) as u64).read_to_end(&mut part).map_err(|e| failed(&path, e))?;
        look.reading.moved(read)?;
        look.reading.became_tokens(read as u64);
        hash.update(&part);
        let (records, rest) = part.as_chunks::<RECORD>();
        for record in records {
            let class = record[0];
            if usize::from(class) >= CLASSES.len() {
                let image = classes.len();
                return Err(wrong(format!("image {image} has class {class}, expected 0 to 9, as CIFAR-10 has them")));
            }
            classes.push(class);
        }
        if !rest.is_empty() {
            let (images, left) = (classes.len(), rest.len());
            return Err(wrong(format!(
                "has {left} bytes after {images} images, expected {RECORD} bytes for each: it is cut short, or not CIFAR-10"
            )));
        }
        if read == 0 {
            break;
        }
    }
    if classes.is_empty() {
        return Err(wrong("is empty, expected images of CIFAR-10".to_owned()));
    }
    Ok((classes, hash.finish(), stamp))
}
