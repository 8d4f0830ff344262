//! Kernels compiled for the device at hand, and kept in a folder for the next start.
#![expect(unsafe_code, reason = "NVRTC's interface")]

use std::ffi::{CStr, CString};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use cudarc::nvrtc::{result, sys};

use super::kernel;
use crate::ExecutorError;

/// A folder for compiled kernels instead of the user's cache.
const FOLDER: &str = "FUSIONLLM_CUDA_CACHE";

/// Compiles kernels for one kind of device.
#[derive(Debug)]
pub(super) struct Compiler {
    /// As NVRTC calls it: `sm_90`.
    architecture: String,
    version: (i32, i32),
    cache: Option<PathBuf>,
}

impl Compiler {
    /// For devices of this compute capability.
    ///
    /// # Errors
    /// [`ExecutorError::Device`] if NVRTC does not answer.
    pub(super) fn new((major, minor): (i32, i32)) -> Result<Self, ExecutorError> {
        let mut version = (0, 0);
        // SAFETY: the two numbers outlive the call.
        unsafe { sys::nvrtcVersion(&raw mut version.0, &raw mut version.1) }.result().map_err(failed)?;
        Ok(Self { architecture: format!("sm_{major}{minor}"), version, cache: cache_folder() })
    }

    /// The machine code of a file of kernels.
    ///
    /// # Errors
    /// [`ExecutorError::Device`] with the compiler's words.
    pub(super) fn machine_code(&self, file: &str) -> Result<Vec<u8>, ExecutorError> {
        let source = kernel::source(file)
            .ok_or_else(|| ExecutorError::Internal { what: format!("there are no kernels `{file}`") })?;
        let key = format!("{source}\n{:?}\n{:?}", self.options(), self.version);
        let name = format!("{file}-{}-{}.cubin", self.architecture, &blake3::hash(key.as_bytes()).to_hex()[..16]);
        let kept = self.cache.as_ref().map(|folder| folder.join(name));
        if let Some(code) = kept.as_deref().and_then(read) {
            return Ok(code);
        }
        let (code, _) = self.compile(file, source, &[])?;
        if let Some(path) = &kept
            && let Err(error) = keep(path, &code)
        {
            tracing::debug!(path = %path.display(), %error, "compiled kernels are not kept");
        }
        Ok(code)
    }

    fn options(&self) -> Vec<String> {
        vec![format!("--gpu-architecture={}", self.architecture), "--std=c++17".to_owned()]
    }

    /// Machine code, and what the compiler said.
    fn compile(&self, file: &str, source: String, more: &[&str]) -> Result<(Vec<u8>, String), ExecutorError> {
        let text = |text: String| CString::new(text).map_err(|e| ExecutorError::Internal { what: e.to_string() });
        let (source, name) = (text(source)?, text(format!("{file}.cu"))?);
        let program = result::create_program(&source, Some(&name)).map_err(failed)?;
        let mut options = self.options();
        options.extend(more.iter().map(|&option| option.to_owned()));
        // SAFETY: the program is destroyed below, and only there.
        let compiled = unsafe { result::compile_program(program, &options) };
        let code = match compiled {
            Ok(()) => code_of(program).map_err(failed).map(|code| (code, log_of(program))),
            Err(error) => Err(ExecutorError::Device {
                reason: format!(
                    "kernels `{file}` do not compile for {}: {error}\n{}",
                    self.architecture,
                    log_of(program)
                ),
            }),
        };
        // SAFETY: nothing uses the program any more.
        unsafe { result::destroy_program(program) }.map_err(failed)?;
        code
    }
}

fn code_of(program: sys::nvrtcProgram) -> Result<Vec<u8>, result::NvrtcError> {
    let mut bytes = 0;
    // SAFETY: the program is compiled, and the vector has as many bytes as NVRTC says that it writes.
    unsafe {
        sys::nvrtcGetCUBINSize(program, &raw mut bytes).result()?;
        let mut code = vec![0u8; bytes];
        sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()).result()?;
        Ok(code)
    }
}

fn log_of(program: sys::nvrtcProgram) -> String {
    // SAFETY: the program exists; its log ends with a zero.
    let Ok(log) = (unsafe { result::get_program_log(program) }) else { return String::new() };
    let bytes: Vec<u8> = log.into_iter().map(|c| c.to_ne_bytes()[0]).collect();
    CStr::from_bytes_until_nul(&bytes).map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
}

fn failed(error: result::NvrtcError) -> ExecutorError {
    ExecutorError::Device { reason: format!("NVRTC: {error}") }
}

fn cache_folder() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os(FOLDER) {
        return Some(PathBuf::from(folder));
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| std::env::home_dir().map(|home| home.join(".cache")))?;
    Some(cache.join("fusionllm").join("cuda"))
}

/// Kept code with its hash before it: half a file is no code.
fn read(path: &Path) -> Option<Vec<u8>> {
    let bytes = fs::read(path).ok()?;
    let (hash, code) = bytes.split_at_checked(blake3::OUT_LEN)?;
    (blake3::hash(code).as_bytes() == hash).then(|| code.to_vec())
}

fn keep(path: &Path, code: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(blake3::hash(code).as_bytes())?;
    file.write_all(code)?;
    file.persist(path).map_err(|e| e.error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::libraries;
    use super::*;

    /// Only where NVRTC is; it needs no device.
    #[test]
    fn every_kernel_compiles_for_every_architecture_without_memory_of_its_own() {
        if libraries::open_compiler().is_err() {
            eprintln!("left out: NVRTC is not here");
            return;
        }
        let check = |&architecture: &&str| {
            let compiler = Compiler { architecture: architecture.to_owned(), version: (0, 0), cache: None };
            // Turing has no bf16, and needs no kernels that multiply it.
            let multiplies_bf16 =
                |file: &str| ["attention", "attention_grad"].contains(&file.trim_start_matches("grouped_"));
            for file in kernel::files().filter(|file| architecture != "sm_75" || !multiplies_bf16(file)) {
                let source = kernel::source(file).unwrap();
                let (code, said) = compiler.compile(file, source, &["--ptxas-options=--verbose"]).unwrap();
                assert!(!code.is_empty());
                let uses: Vec<&str> = said.lines().filter(|line| line.contains("stack frame")).collect();
                assert!(!uses.is_empty(), "{said}");
                for line in uses {
                    let clean = line.contains(" 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads");
                    assert!(clean, "{file}, {architecture}: {line}");
                }
            }
        };
        std::thread::scope(|scope| {
            let check = &check;
            for some in [["sm_75", "sm_90"], ["sm_80", "sm_120"]] {
                scope.spawn(move || some.iter().for_each(check));
            }
        });
    }

    #[test]
    fn kept_code_comes_back_and_half_of_it_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/x.cubin");
        keep(&path, b"code").unwrap();
        assert_eq!(read(&path).unwrap(), b"code");
        fs::write(&path, &fs::read(&path).unwrap()[..34]).unwrap();
        assert_eq!(read(&path), None);
    }
}
