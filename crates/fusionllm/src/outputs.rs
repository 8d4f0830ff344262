//! Files that a command writes: none may be one that it reads, nor one of another kind, which it would destroy.

use std::io::Read;
use std::path::{Path, PathBuf};

use fusionllm_broker::is_of_a_run;
use fusionllm_protocol::JobSpec;
pub(crate) use fusionllm_transport::is_same_file;
use fusionllm_transport::{folder_of, is_shortage, no_folder_above, open_regular};

use crate::exit::bad_input;

/// The job's key for what it trains on.
const DATA_PATH: &str = "data.path";

/// A file that an option names for writing.
#[derive(Debug)]
pub(crate) struct Output<'a> {
    /// The option of the command line that names the file.
    pub(crate) option: &'static str,
    /// The file that is to be written.
    pub(crate) path: &'a Path,
    /// What is written, for people.
    pub(crate) kind: &'static str,
    /// How every such file begins. One that is there and begins so is replaced.
    pub(crate) begins: &'static str,
}

/// The files that a command reads, each with what names it.
#[derive(Debug, Default)]
pub(crate) struct Inputs(Vec<(String, PathBuf)>);

impl Inputs {
    /// One more; `what` is the option or key that names it.
    pub(crate) fn add(&mut self, what: impl Into<String>, path: &Path) {
        self.0.push((what.into(), path.to_owned()));
    }

    /// A job file and what it names.
    pub(crate) fn add_job(&mut self, file: &Path, spec: &JobSpec) {
        self.add("the job file", file);
        for (key, path) in [("model.path", &spec.model.path), ("placement.cluster", &spec.placement.cluster)] {
            path.iter().for_each(|path| self.add(key, path));
        }
        spec.data.path.iter().for_each(|path| self.add(DATA_PATH, path));
        spec.data.tokenizer_file().into_iter().for_each(|path| self.add("data.tokenizer", path));
    }

    /// The first that lies at `path` or, if that is a folder, anywhere in it.
    pub(crate) fn at_or_in(&self, path: &Path) -> Option<&(String, PathBuf)> {
        let folder = path.canonicalize().ok();
        let lies_in = |input: &Path| {
            let real = input.canonicalize().ok();
            folder.as_ref().zip(real).is_some_and(|(folder, real)| real.starts_with(folder))
        };
        self.0.iter().find(|(_, input)| is_same_file(input, path) || lies_in(input))
    }
}

/// Whether these files can be written without harm: each in a folder that is there, to a name of its own, and in place of
/// nothing but an earlier one of its kind.
pub(crate) fn check(outputs: &[Output<'_>]) -> anyhow::Result<()> {
    for (index, output) in outputs.iter().enumerate() {
        output.check()?;
        let is_same = |other: &&Output<'_>| {
            is_same_file(other.path, output.path) || absolute(other.path) == absolute(output.path)
        };
        if let Some(other) = outputs.iter().take(index).find(is_same) {
            let (a, b, path) = (other.option, output.option, output.path.display());
            return Err(bad_input(format!("{a} and {b} both name {path}, give each a file of its own")));
        }
    }
    Ok(())
}

/// Whether none of them is a file that the same command reads, nor would be one of the next job on the same data.
pub(crate) fn check_against(outputs: &[Output<'_>], inputs: &Inputs) -> anyhow::Result<()> {
    for Output { option, path, .. } in outputs {
        if let Some((what, input)) = inputs.0.iter().find(|(_, input)| is_same_file(input, path)) {
            let (path, input) = (path.display(), input.display());
            return Err(bad_input(format!("{option} {path} would overwrite {what}, {input}: give another file")));
        }
        let place = absolute(path);
        let is_above = |(what, folder): &&(String, PathBuf)| {
            let folder = folder.canonicalize().ok().filter(|folder| what == DATA_PATH && folder.is_dir());
            folder.zip(place.as_ref()).is_some_and(|(folder, place)| place.starts_with(folder))
        };
        if let Some((what, folder)) = inputs.0.iter().find(is_above) {
            let (path, folder) = (path.display(), folder.display());
            let reason = format!("would lie in {what}, {folder}, and be trained on: give another folder");
            return Err(bad_input(format!("{option} {path} {reason}")));
        }
    }
    Ok(())
}

/// Whether a file of this name has a folder to lie in.
pub(crate) fn check_folder_of(option: &str, path: &Path) -> anyhow::Result<()> {
    match absolute(path) {
        Some(_) => Ok(()),
        None => Err(bad_input(format!("{option} {} lies in no folder that is there, make it first", path.display()))),
    }
}

/// Whether this is a folder, or one can be made there.
pub(crate) fn check_folder(option: &str, path: &Path) -> anyhow::Result<()> {
    if std::path::absolute(path).is_ok_and(|place| place.to_str().is_none()) {
        let path = path.display();
        return Err(bad_input(format!(
            "{option} {path} lies in a folder whose name is not UTF-8, give one whose name is"
        )));
    }
    match no_folder_above(path) {
        None => Ok(()),
        Some(above) if above == path => Err(bad_input(format!("{option} {} is no folder, give one", path.display()))),
        Some(above) => Err(bad_input(format!("{option} {}: {} is no folder", path.display(), above.display()))),
    }
}

/// Where a file comes to lie: of a link that leads somewhere, there. Nothing if there is no folder for it.
pub(crate) fn absolute(path: &Path) -> Option<PathBuf> {
    if let Ok(there) = path.canonicalize() {
        return Some(there);
    }
    Some(folder_of(path).canonicalize().ok()?.join(path.file_name()?))
}

/// Whether a file would lie in a run directory, a checkpoint, or anywhere below one.
fn is_among_a_runs(path: &Path) -> bool {
    let has = |folder: &Path, name: &str| folder.join(name).is_file();
    let is_runs = |folder: &Path| has(folder, "run.id") || has(folder, "run.json") && has(folder, "job.json");
    // Those of version 0.1.0, and run directories that have just begun, are told by one file alone.
    path.parent().is_some_and(is_of_a_run) || path.ancestors().skip(1).any(is_runs)
}

impl Output<'_> {
    fn check(&self) -> anyhow::Result<()> {
        let Self { option, path, kind, begins } = self;
        let refuse = |reason: String| Err(bad_input(format!("{option} {} {reason}", path.display())));
        if path.is_dir() || path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return refuse("is a directory, expected a file's name".to_owned());
        }
        check_folder_of(option, path)?;
        if absolute(path).is_some_and(|place| is_among_a_runs(&place)) {
            return refuse("would lie among a run's own files: give another folder".to_owned());
        }
        if !path.exists() {
            return match path.symlink_metadata() {
                Ok(_) => refuse("is a link to nothing: give another file, or remove it".to_owned()),
                Err(_) => Ok(()),
            };
        }
        let mut first = Vec::new();
        match open_regular(path) {
            Ok(file) => file.take(begins.len() as u64).read_to_end(&mut first)?,
            Err(error) if is_shortage(&error) => {
                return Err(anyhow::Error::new(error).context(path.display().to_string()));
            }
            Err(error) => return refuse(format!("exists, and cannot be looked at: {error}; give another file")),
        };
        if first.is_empty() || first == begins.as_bytes() {
            return Ok(());
        }
        refuse(format!("exists and is not {kind}: give another file, or move it away"))
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn output(path: &Path) -> Output<'_> {
        Output { option: "--svg", path, kind: "a drawing", begins: "<svg " }
    }

    #[test]
    fn only_an_earlier_file_of_its_kind_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        std::fs::write(file("drawing"), "<svg a>").unwrap();
        std::fs::write(file("empty"), "").unwrap();
        std::fs::write(file("text"), "precious").unwrap();
        for (name, reason) in [("drawing", ""), ("empty", ""), ("new", ""), ("text", "is not a drawing")] {
            let result = check(&[output(&file(name))]).map_err(|e| e.to_string());
            assert_eq!(result.is_ok(), reason.is_empty(), "{name}: {result:?}");
            assert!(result.err().unwrap_or_default().contains(reason));
        }
        std::fs::create_dir_all(file("run/deep")).unwrap();
        std::fs::create_dir_all(file("step-4/deep")).unwrap();
        for name in ["run/run.json", "run/job.json", "step-4/run.id"] {
            std::fs::write(file(name), "{}").unwrap();
        }
        // Other programs have files of these names, too.
        std::fs::create_dir(file("app")).unwrap();
        for name in ["manifest.json", "run.json"] {
            std::fs::write(file("app").join(name), "{\"name\": \"app\", \"manifest_version\": 3}").unwrap();
            check(&[output(&file("app/x"))]).unwrap();
        }
        std::fs::create_dir(file("old")).unwrap();
        std::fs::write(file("old/manifest.json"), "{\"format\": \"fusionllm-checkpoint\"}").unwrap();
        std::os::unix::fs::symlink("nowhere", file("lost")).unwrap();
        std::os::unix::fs::symlink("step-4", file("soft")).unwrap();
        let places = [
            ("none/x", "make it first"),
            ("lost", "is a link to nothing"),
            ("run/x", "among a run's own files"),
            ("run/deep/x", "among a run's own files"),
            ("step-4/x", "among a run's own files"),
            ("step-4/deep/x", "among a run's own files"),
            ("soft/x", "among a run's own files"),
            ("old/x", "among a run's own files"),
        ];
        for (path, reason) in [("/dev/null", "no regular file")].into_iter().chain(places) {
            let path = &file(path);
            let error = check(&[output(path)]).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        let twice = check(&[output(&file("new")), output(&file("../").join(file("new")))]);
        assert!(twice.unwrap_err().to_string().contains("both name"));
    }

    #[test]
    fn a_file_is_known_by_every_link_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        std::fs::write(file("job"), "<svg a>").unwrap();
        std::fs::hard_link(file("job"), file("hard")).unwrap();
        std::os::unix::fs::symlink("job", file("soft")).unwrap();
        let mut inputs = Inputs::default();
        inputs.add("the job file", &file("job"));
        for name in ["job", "hard", "soft"] {
            let error = check_against(&[output(&file(name))], &inputs).unwrap_err().to_string();
            assert!(error.contains("would overwrite the job file") && error.contains(name), "{error}");
        }
        check_against(&[output(&file("other"))], &inputs).unwrap();
        std::fs::create_dir_all(file("data/deep")).unwrap();
        std::os::unix::fs::symlink("data/deep", file("into")).unwrap();
        inputs.add(DATA_PATH, &file("data"));
        for name in ["data/x", "data/deep/x", "into/x"] {
            let error = check_against(&[output(&file(name))], &inputs).unwrap_err().to_string();
            assert!(error.contains("would lie in data.path") && error.contains("be trained on"), "{error}");
        }
        assert!(inputs.at_or_in(folder.path()).is_some() && inputs.at_or_in(&file("other")).is_none());
    }
}
