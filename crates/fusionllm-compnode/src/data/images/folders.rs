//! A folder of images with a folder in it for each class.

use std::collections::BTreeMap;
use std::io::Read;

use fusionllm_protocol::{FileFingerprint, content_hash};
use rayon::prelude::*;

use super::pixels::Picture;
use super::{Entry, Found, Look, MOST_BYTES, failed, for_people, number};
use crate::DataError;
use crate::data::files::{LeftOut, TextFile, shown};

/// Reads every image once.
pub(super) fn read(look: Look<'_>, files: Vec<TextFile>, left_out: &mut LeftOut) -> Result<Found, DataError> {
    let by_class = by_class(look, files, left_out)?;
    if by_class.is_empty() {
        let what = "folder of a class with files that end in .png, .jpg or .jpeg".to_owned();
        let mut paths: Vec<String> = look.spec.path.iter().map(|path| path.display().to_string()).collect();
        paths.extend(left_out.notes());
        return Err(DataError::NoText { what, paths: paths.join("; ") });
    }
    let sizes = by_class.values().flatten().filter_map(|file| std::fs::metadata(&file.path).ok());
    look.reading.begins(sizes.map(|size| size.len()).sum());
    let mut found = Found::default();
    for (class, (name, files)) in by_class.into_iter().enumerate() {
        let held_out = held_out(files.len(), look.spec.eval_fraction);
        if held_out == 0 {
            let path = look.spec.path.first().cloned().unwrap_or_default();
            // A class of private data has no name for others.
            let class = if look.spec.private { "a class".to_owned() } else { format!("class `{name}`") };
            let reason = format!("{class} has one image, expected at least two: one of them is held out");
            return Err(DataError::Path { path, reason });
        }
        let seen: Vec<FileFingerprint> = files.par_iter().map(|file| look_at(look, file)).collect::<Result<_, _>>()?;
        let first = files.len() - held_out;
        for (index, (file, seen)) in files.into_iter().zip(seen).enumerate() {
            let entry = Entry { file: number(found.paths.len()), record: 0, class: number(class) };
            let train_bytes = if index < first { seen.bytes } else { 0 };
            if index < first {
                found.train.push(entry)
            } else {
                found.eval.push(entry)
            }
            found.files.push(FileFingerprint { train_bytes, ..seen });
            found.paths.push(file.path);
        }
        found.classes.push(name);
    }
    Ok(found)
}

/// Images of a class that are held out: at least one, and never all.
fn held_out(images: usize, share: f64) -> usize {
    ((images as f64 * share).ceil() as usize).clamp(1, images.max(1)).min(images.saturating_sub(1))
}

/// The files of each class, in the order of their paths.
fn by_class(
    look: Look<'_>,
    files: Vec<TextFile>,
    left_out: &mut LeftOut,
) -> Result<BTreeMap<String, Vec<TextFile>>, DataError> {
    let mut classes: BTreeMap<String, Vec<TextFile>> = BTreeMap::new();
    for file in files {
        let wrong = |reason: &str| DataError::Path { path: for_people(&file, look.spec), reason: reason.to_owned() };
        if file.named {
            return Err(wrong("is a file, expected a folder with a folder of images for each class"));
        }
        let ending = file.path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        if !look.spec.format.endings().iter().any(|of| ending.eq_ignore_ascii_case(of)) {
            left_out.add("of another form than data.format", &file.name);
            continue;
        }
        // The longest folder that the job names, as one may lie in another.
        let roots = look.spec.path.iter().filter_map(|root| file.path.strip_prefix(root).ok());
        let below = roots.min_by_key(|below| below.components().count());
        let mut parts = below.into_iter().flat_map(|below| below.components());
        let (Some(class), Some(_)) = (parts.next(), parts.next()) else {
            return Err(wrong("is of no class: expected it in a folder that is named like its class"));
        };
        // Two names that are told apart by what is no text would become one class.
        let Some(class) = class.as_os_str().to_str().map(str::to_owned) else {
            return Err(wrong("is in a folder of a class whose name is no UTF-8: rename the folder"));
        };
        classes.entry(class).or_default().push(file);
    }
    Ok(classes)
}

/// Reads an image to know that it is one.
fn look_at(look: Look<'_>, file: &TextFile) -> Result<FileFingerprint, DataError> {
    let path = for_people(file, look.spec);
    let open = look.readable.open(&file.path).map_err(|e| failed(&path, e))?;
    let mut bytes = Vec::new();
    open.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(|e| failed(&path, e))?;
    look.reading.moved(bytes.len().max(1))?;
    look.reading.became_tokens(bytes.len() as u64);
    let size = bytes.len() as u64;
    if size > MOST_BYTES {
        return Err(DataError::Path { path, reason: format!("has over {} MiB, expected an image", MOST_BYTES >> 20) });
    }
    Picture::check(&bytes).map_err(|reason| DataError::Path { path, reason })?;
    let (name, hash) = (shown(&file.name, look.spec.private), content_hash(&bytes));
    Ok(FileFingerprint { name, bytes: size, train_bytes: size, hash })
}
