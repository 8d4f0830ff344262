//! NVIDIA's libraries, found where users have them: the loader's path, a CUDA toolkit, or what PyTorch's wheels install.
//!
//! `cudarc` opens them by bare names and panics where there is none. So they are opened here first, by path if need be:
//! once a library is in the process, opening its bare name finds it.
#![expect(unsafe_code, reason = "opening a library runs its initialisers")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use cudarc::driver::sys::is_culib_present as is_driver_present;
use libloading::Library;

/// A folder that is searched first.
const FOLDER: &str = "FUSIONLLM_CUDA";
/// The driver, which the loader finds.
const DRIVER: [&str; 3] = ["libcuda.so.1", "libcuda.so", "nvcuda.dll"];
/// CUDA's major versions that this program can use, the best first.
const MAJORS: [&str; 2] = ["13", "12"];

/// What is missing, and how to get it.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum Missing {
    /// There is no driver.
    #[error("no NVIDIA driver is installed (libcuda.so.1 is not found): install the driver of your distribution")]
    Driver,
    /// A library of the CUDA toolkit.
    #[error(
        "{library} is not found; `pip install {wheel}` brings it, or set {FOLDER} to the folder that holds it \
         (a CUDA toolkit, version 12 or 13, has it in lib64)"
    )]
    Toolkit {
        /// The library's name.
        library: &'static str,
        /// The Python package that has it.
        wheel: &'static str,
    },
}

/// Opens the driver, cuBLASLt and NVRTC. They stay open.
///
/// # Errors
/// [`Missing`] names the first that is not there.
pub(super) fn open_all() -> Result<(), Missing> {
    static OPENED: OnceLock<Result<(), Missing>> = OnceLock::new();
    OPENED.get_or_init(open_each).clone()
}

/// Whether the driver's library is there.
pub(super) fn has_driver() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    // SAFETY: asks whether the loader finds the library that the calls use.
    *FOUND.get_or_init(|| DRIVER.iter().any(|name| keep_open(Path::new(name))) || unsafe { is_driver_present() })
}

fn open_each() -> Result<(), Missing> {
    if !has_driver() {
        return Err(Missing::Driver);
    }
    // SAFETY: asks whether the loader finds the library that the calls use.
    let blas = || unsafe { cudarc::cublaslt::sys::is_culib_present() };
    if !open_one("cublasLt", blas) {
        return Err(Missing::Toolkit { library: "libcublasLt.so", wheel: "nvidia-cublas" });
    }
    open_compiler()
}

/// Opens a library: in the folder that is named, else as the loader finds it, else where toolkits and wheels put it.
fn open_one(name: &str, present: impl Fn() -> bool) -> bool {
    let is_named = open_in(&named(), name);
    (is_named || present() || open_in(&folders(), name)) && present()
}

/// Opens NVRTC, which needs no device.
pub(super) fn open_compiler() -> Result<(), Missing> {
    // SAFETY: as above.
    let present = || unsafe { cudarc::nvrtc::sys::is_culib_present() };
    if open_one("nvrtc", present) {
        return Ok(());
    }
    Err(Missing::Toolkit { library: "libnvrtc.so", wheel: "nvidia-cuda-nvrtc" })
}

/// Opens the library of this name in the first folder that has it, in the best version that is there and that the driver
/// can work with.
fn open_in(folders: &[PathBuf], name: &str) -> bool {
    let newest = driver_major();
    let known =
        MAJORS.iter().filter(|major| newest.is_none_or(|newest| major.parse::<i32>().is_ok_and(|m| m <= newest)));
    let versions = known.flat_map(|major| folders.iter().map(move |folder| (folder, major)));
    versions.into_iter().any(|(folder, major)| {
        let path = folder.join(format!("lib{name}.so.{major}"));
        path.exists() && keep_open(&path)
    })
}

/// The newest major version of CUDA that the driver can work with.
fn driver_major() -> Option<i32> {
    let mut version = 0;
    // SAFETY: the driver is there, and the number outlives the call.
    let asked = has_driver() && unsafe { cudarc::driver::sys::cuDriverGetVersion(&raw mut version) }.result().is_ok();
    asked.then_some(version / 1000)
}

fn keep_open(path: &Path) -> bool {
    // SAFETY: these are NVIDIA's own libraries, whose initialisers ask nothing of the caller.
    match unsafe { Library::new(path) } {
        Ok(library) => {
            std::mem::forget(library);
            true
        }
        Err(error) => {
            tracing::debug!(path = %path.display(), %error, "not opened");
            false
        }
    }
}

/// The folder that the user names, and where it may have libraries.
fn named() -> Vec<PathBuf> {
    let folder = std::env::var_os(FOLDER).filter(|folder| !folder.is_empty()).map(PathBuf::from);
    folder.map_or(Vec::new(), |folder| vec![folder.join("lib64"), folder.join("lib"), folder])
}

/// Where the libraries may be, in the order in which they are looked for.
fn folders() -> Vec<PathBuf> {
    let mut folders = vec![PathBuf::from("/usr/local/cuda/lib64")];
    let mut toolkits = entries_of(Path::new("/usr/local"), "cuda-");
    toolkits.sort();
    folders.extend(toolkits.into_iter().rev().map(|toolkit| toolkit.join("lib64")));
    folders.extend(std::env::var_os("CONDA_PREFIX").map(|prefix| PathBuf::from(prefix).join("lib")));
    for site in site_packages() {
        for package in entries_of(&site.join("nvidia"), "") {
            folders.push(package.join("lib"));
        }
    }
    folders.extend(std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_path_buf)));
    folders
}

fn entries_of(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<_> =
        entries.filter(|e| e.file_name().to_string_lossy().starts_with(prefix)).map(|e| e.path()).collect();
    paths.sort();
    paths
}

/// The folders of Python's packages, as Python itself tells them.
fn site_packages() -> Vec<PathBuf> {
    let code = "import site, sys; print('\\n'.join(site.getsitepackages() + [site.getusersitepackages()] + sys.path))";
    let asked = Command::new("python3").args(["-c", code]).output();
    let text = asked.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let mut folders: Vec<PathBuf> = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        if !folders.iter().any(|folder| folder.as_os_str() == line) {
            folders.push(PathBuf::from(line));
        }
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_the_command_that_brings_it() {
        let text = Missing::Toolkit { library: "libnvrtc.so", wheel: "nvidia-cuda-nvrtc" }.to_string();
        assert!(text.contains("pip install nvidia-cuda-nvrtc") && text.contains("FUSIONLLM_CUDA"), "{text}");
    }

    #[test]
    fn a_folder_without_the_library_opens_nothing() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!open_in(&[folder.path().to_path_buf()], "nvrtc"));
        std::fs::write(folder.path().join("libnvrtc.so.13"), "not a library").unwrap();
        assert!(!open_in(&[folder.path().to_path_buf()], "nvrtc"));
    }
}
