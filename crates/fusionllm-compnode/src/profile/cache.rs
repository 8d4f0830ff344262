//! What was measured before, in a file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fusionllm_planner::Measured;
use fusionllm_transport::{FileMode, folder_of, make_private_dir, read_regular, write_whole};
use serde::{Deserialize, Serialize};

use crate::DeviceSpeed;

/// Jobs that are remembered, the last ones.
const MOST_JOBS: usize = 32;

/// Everything known of one device. Reading and writing it never fails a job: it is measured again then.
#[derive(Debug)]
pub(crate) struct ProfileCache {
    path: Option<PathBuf>,
    content: Content,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Content {
    /// Program, device and threads for which it holds.
    made_with: String,
    speed: Option<DeviceSpeed>,
    /// By the work of their OP-DAG, the last one at the end.
    jobs: Vec<(String, Measured)>,
}

impl ProfileCache {
    /// What is known of `device` in `folder`; nothing without a folder, and nothing that another program measured.
    pub(crate) fn open(folder: Option<&Path>, device: &str) -> Self {
        let build = if cfg!(debug_assertions) { "debug" } else { "release" };
        let made_with = format!("{} {build}, {device}", env!("CARGO_PKG_VERSION"));
        let slug: String = device.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let path = folder.map(|folder| folder.join(format!("profile-{slug}.json")));
        let text = path.as_ref().and_then(|path| read_regular(path).ok());
        let content: Option<Content> = text.and_then(|text| serde_json::from_slice(&text).ok());
        let content = content.filter(|c| c.made_with == made_with);
        Self { path, content: content.unwrap_or_else(|| Content { made_with, ..Content::default() }) }
    }

    /// The device's speed.
    pub(crate) fn speed(&self) -> Option<DeviceSpeed> {
        self.content.speed
    }

    pub(crate) fn set_speed(&mut self, speed: DeviceSpeed) {
        self.content.speed = Some(speed);
        self.write();
    }

    /// What was measured for an OP-DAG of this work.
    pub(crate) fn job(&self, work: &str) -> Option<Measured> {
        self.content.jobs.iter().find(|(known, _)| known == work).map(|(_, measured)| measured.clone())
    }

    pub(crate) fn set_job(&mut self, work: &str, measured: Measured) {
        self.content.jobs.retain(|(known, _)| known != work);
        self.content.jobs.push((work.to_owned(), measured));
        let surplus = self.content.jobs.len().saturating_sub(MOST_JOBS);
        self.content.jobs.drain(..surplus);
        self.write();
    }

    fn write(&self) {
        let Some(path) = &self.path else { return };
        if let Err(error) = write_content(path, &self.content) {
            tracing::warn!(path = %path.display(), %error, "the device's profile cannot be kept");
        }
    }
}

fn write_content(path: &Path, content: &Content) -> std::io::Result<()> {
    // A broker on this machine keeps its secrets there.
    make_private_dir(folder_of(path)).map_err(std::io::Error::other)?;
    write_whole(path, &serde_json::to_vec_pretty(content)?, FileMode::Private)
}

/// Names the work of an OP-DAG: how often which work is done.
pub(crate) fn work_of(dag: &fusionllm_graph::OpDag, batch: usize) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for op in dag.op_ids() {
        *counts.entry(dag.work(op, batch)).or_default() += 1;
    }
    let words: Vec<String> = counts.into_iter().map(|(work, count)| format!("{count} {work}")).collect();
    words.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_is_found_again_by_the_same_program_and_device() {
        let folder = tempfile::tempdir().unwrap();
        let speed = DeviceSpeed { flop_per_s: 1e9, memory_bytes_per_s: 2e9 };
        let measured = Measured { copy_s_per_byte: 1e-9, ..Measured::default() };
        let mut cache = ProfileCache::open(Some(folder.path()), "cpu (2 threads)");
        assert_eq!(cache.speed(), None);
        cache.set_speed(speed);
        cache.set_job("1 add", measured.clone());

        let again = ProfileCache::open(Some(folder.path()), "cpu (2 threads)");
        assert_eq!((again.speed(), again.job("1 add")), (Some(speed), Some(measured)));
        assert_eq!(again.job("2 add"), None);
        assert_eq!(ProfileCache::open(Some(folder.path()), "cpu (1 threads)").speed(), None);
        let path = folder.path().join("profile-cpu--2-threads-.json");
        let text = std::fs::read_to_string(&path).unwrap().replace(env!("CARGO_PKG_VERSION"), "0.0.0");
        std::fs::write(&path, text).unwrap();
        assert_eq!(ProfileCache::open(Some(folder.path()), "cpu (2 threads)").speed(), None);
        std::fs::write(&path, "{").unwrap();
        assert_eq!(ProfileCache::open(Some(folder.path()), "cpu (2 threads)").speed(), None);
    }

    #[test]
    fn only_the_last_jobs_are_remembered() {
        let mut cache = ProfileCache::open(None, "cpu");
        for job in 0..MOST_JOBS + 3 {
            cache.set_job(&job.to_string(), Measured::default());
        }
        assert_eq!((cache.job("2"), cache.job("3")), (None, Some(Measured::default())));
    }
}
