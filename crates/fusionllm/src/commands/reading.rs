//! Reading of a job's data, and what is shown of it meanwhile.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use fusionllm_compnode::{Corpus, DataError, ImageSet, Reading, Tokenizing};
use fusionllm_protocol::DataSpec;

use crate::render;

/// How often it is said how far it is.
const EVERY: Duration = Duration::from_secs(2);

/// Reads text. If that takes a while and the output is for people, it says how far it is.
pub(super) fn read(spec: &DataSpec, by: Tokenizing<'_>, is_json: bool) -> Result<Corpus, DataError> {
    let corpus = watched(is_json, |reading| Corpus::read_watched(spec, by, reading));
    if let Some(note) = corpus.as_ref().ok().and_then(Corpus::made_anew).filter(|_| !is_json) {
        let _ = render::line(&format!("note: {note}"));
    }
    corpus
}

/// The same of images.
pub(super) fn read_images(spec: &DataSpec, is_json: bool) -> Result<ImageSet, DataError> {
    watched(is_json, |reading| ImageSet::read(spec, reading))
}

fn watched<T>(is_json: bool, read: impl FnOnce(&Reading) -> Result<T, DataError>) -> Result<T, DataError> {
    let reading = Reading::default();
    let (ends, ended) = channel::<()>();
    std::thread::scope(|scope| {
        let reading = &reading;
        scope.spawn(move || {
            while ended.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                let (done, total) = reading.bytes();
                if total > 0 && !is_json {
                    // Whoever does not listen will be told by what comes later.
                    let _ = render::line(&render::reading(done, total));
                }
            }
        });
        let found = read(reading);
        drop(ends);
        found
    })
}
