//! A GPU on the CPU, for tests: the same kernels, compiled for the CPU by a C++ compiler, and products in plain loops.
#![expect(unsafe_code, reason = "calls compiled kernels")]

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use libloading::{Library, Symbol};

use super::gpu::{Element, Gpu, Kernel, Matrix, Operands, Product};
use super::kernel;
use crate::ExecutorError;

const ALIGNMENT: usize = 512;

/// Memory of the CPU as that of a GPU. What was never written is NaN.
#[derive(Debug, Default)]
pub(super) struct Emulated {
    taken: Mutex<BTreeMap<u64, usize>>,
    most_taken: AtomicUsize,
}

impl Emulated {
    pub(super) fn open() -> Arc<dyn Gpu> {
        Arc::new(Self::default())
    }

    /// The most bytes that were taken at once.
    pub(super) fn most_taken(&self) -> usize {
        self.most_taken.load(Ordering::Relaxed)
    }

    /// Holds an access against what is taken: a real device would fail, or worse, not.
    fn check(&self, at: u64, bytes: usize) {
        let taken = self.taken.lock().unwrap();
        let within =
            taken.range(..=at).next_back().is_some_and(|(&start, &size)| at + bytes as u64 <= start + size as u64);
        assert!(bytes == 0 || within, "{bytes} bytes at {at:#x} are nobody's");
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        for (&address, &bytes) in self.taken.lock().unwrap().iter() {
            // SAFETY: `take` allocated it so.
            unsafe { dealloc(address as *mut u8, layout(bytes)) };
        }
    }
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, ALIGNMENT).unwrap()
}

impl Gpu for Emulated {
    fn take(&self, bytes: usize) -> Result<u64, ExecutorError> {
        let bytes = bytes.next_multiple_of(ALIGNMENT);
        // SAFETY: the size is not zero; all bytes are written.
        let address = unsafe {
            let address = alloc(layout(bytes));
            assert!(!address.is_null());
            address.write_bytes(0xff, bytes);
            address as u64
        };
        let mut taken = self.taken.lock().unwrap();
        taken.insert(address, bytes);
        self.most_taken.fetch_max(taken.values().sum(), Ordering::Relaxed);
        Ok(address)
    }

    fn give_back(&self, address: u64, _: usize) {
        let bytes = self.taken.lock().unwrap().remove(&address).unwrap();
        // SAFETY: `take` allocated it so.
        unsafe { dealloc(address as *mut u8, layout(bytes)) };
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), ExecutorError> {
        self.check(to, bytes.len());
        // SAFETY: checked above.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), ExecutorError> {
        self.check(from, bytes.len());
        // SAFETY: checked above.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), ExecutorError> {
        self.check(from, bytes);
        self.check(to, bytes);
        // SAFETY: checked above.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<(), ExecutorError> {
        self.check(at, bytes);
        // SAFETY: checked above.
        unsafe { (at as *mut u8).write_bytes(0, bytes) };
        Ok(())
    }

    fn launch(&self, kernel: Kernel, grid: [u32; 2], arguments: &[u8]) -> Result<(), ExecutorError> {
        type Run = unsafe extern "C" fn(*const u8, u32, u32, u32);
        let library = &libraries()[kernel.file];
        // Kernels' structs are aligned as pointers are.
        let words: Vec<u64> = arguments.as_chunks::<8>().0.iter().map(|&b| u64::from_ne_bytes(b)).collect();
        // SAFETY: every kernel is exported so, and takes one struct, of which these are the bytes.
        unsafe {
            let run: Symbol<'_, Run> = library.get(format!("emu_{}", kernel.name)).unwrap();
            run(words.as_ptr().cast(), grid[0], grid[1], 1);
        }
        Ok(())
    }

    fn multiply(&self, product: &Product, operands: Operands) -> Result<(), ExecutorError> {
        let Product { m, n, k, batch, .. } = *product;
        for index in 0..batch {
            let matrix = |matrix: Matrix, address: u64, rows: usize, columns: usize| {
                let lies = if matrix.transposed { (columns, rows) } else { (rows, columns) };
                let start = address + (index * matrix.stride * matrix.element.bytes()) as u64;
                self.check(start, ((lies.0 - 1) * matrix.leading + lies.1) * matrix.element.bytes());
                (matrix, start)
            };
            let (a, b) = (matrix(product.a, operands.a, m, k), matrix(product.b, operands.b, k, n));
            let d = matrix(product.d, operands.d, m, n);
            let c = product.adds.then(|| matrix(product.d, operands.c, m, n));
            for row in 0..m {
                for column in 0..n {
                    let mut sum = 0f32;
                    for inner in 0..k {
                        sum = get(a, row, inner).mul_add(get(b, inner, column), sum);
                    }
                    let bias =
                        product.bias.then(|| get((Matrix { transposed: false, ..d.0 }, operands.bias), 0, column));
                    let added = c.map(|c| get(c, row, column)).or(bias).unwrap_or(0.0);
                    put(d, row, column, operands.alpha * sum + added);
                }
            }
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), ExecutorError> {
        Ok(())
    }

    fn trim(&self) {}

    fn prepare(&self, _: &[Kernel]) -> Result<(), ExecutorError> {
        Ok(())
    }
}

fn address((matrix, start): (Matrix, u64), row: usize, column: usize) -> u64 {
    let (row, column) = if matrix.transposed { (column, row) } else { (row, column) };
    start + ((row * matrix.leading + column) * matrix.element.bytes()) as u64
}

fn get(of: (Matrix, u64), row: usize, column: usize) -> f32 {
    let at = address(of, row, column);
    // SAFETY: the matrix was checked whole.
    unsafe {
        match of.0.element {
            Element::F32 => (at as *const f32).read(),
            Element::Bf16 => (at as *const half::bf16).read().to_f32(),
        }
    }
}

fn put(of: (Matrix, u64), row: usize, column: usize, value: f32) {
    let at = address(of, row, column);
    // SAFETY: as above.
    unsafe {
        match of.0.element {
            Element::F32 => (at as *mut f32).write(value),
            Element::Bf16 => (at as *mut half::bf16).write(half::bf16::from_f32(value)),
        }
    }
}

/// The kernels by file, compiled once for each version of their sources.
fn libraries() -> &'static BTreeMap<&'static str, Library> {
    static LIBRARIES: OnceLock<BTreeMap<&'static str, Library>> = OnceLock::new();
    LIBRARIES.get_or_init(|| {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda/kernels");
        let words = std::fs::read(sources.join("emu.h")).unwrap();
        std::thread::scope(|scope| {
            let compiled: Vec<_> = kernel::files()
                .map(|file| {
                    let (sources, words) = (&sources, &words);
                    (file, scope.spawn(move || compile(sources, words, file)))
                })
                .collect();
            // SAFETY: the libraries are those that were just compiled.
            compiled
                .into_iter()
                .map(|(file, path)| (file, unsafe { Library::new(path.join().unwrap()) }.unwrap()))
                .collect()
        })
    })
}

/// Runs the programs that hold kernels against plain loops, with threads in order and shuffled; what they say of faults.
pub(super) fn run_kernel_tests() -> Vec<String> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda/kernels/tests");
    let mut programs: Vec<PathBuf> = std::fs::read_dir(&tests).unwrap().map(|entry| entry.unwrap().path()).collect();
    programs.retain(|path| path.extension().is_some_and(|end| end == "cpp"));
    let folder = tempfile::tempdir().unwrap();
    let fault = |path: &PathBuf| {
        let program = folder.path().join(path.file_stem().unwrap());
        let mut compile = Command::new(compiler());
        compile.args(["-std=c++17", "-O2", "-DEMU", "-Wno-unknown-pragmas", "-o"]).arg(&program).arg(path);
        let mut runs = [compile, Command::new(&program), Command::new(&program)];
        runs[2].env("EMU_SEED", "7");
        let failed = runs.iter_mut().map(|run| run.output().unwrap()).find(|output| !output.status.success())?;
        let said = [failed.stdout, failed.stderr].concat();
        Some(format!("{}: {}", path.display(), String::from_utf8_lossy(&said)))
    };
    std::thread::scope(|scope| {
        let half = programs.len().div_ceil(2);
        let halves: Vec<_> = programs
            .chunks(half)
            .map(|some| scope.spawn(|| some.iter().filter_map(fault).collect::<Vec<_>>()))
            .collect();
        halves.into_iter().flat_map(|half| half.join().unwrap()).collect()
    })
}

/// Whether there is no compiler for the kernels; says so.
pub(super) fn is_left_out() -> bool {
    let missing = Command::new(compiler()).arg("--version").output().is_err();
    if missing {
        eprintln!("left out: there is no C++ compiler ({})", compiler());
    }
    missing
}

fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned())
}

fn compile(sources: &Path, words: &[u8], file: &str) -> PathBuf {
    let source = kernel::source(file).unwrap();
    let hash = blake3::hash(&[words, source.as_bytes()].concat()).to_hex();
    // Beside the test itself, where nobody else writes.
    let folder = std::env::current_exe().unwrap().with_file_name("emulated-kernels");
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join(format!("{file}-{}.so", &hash[..16]));
    if !path.exists() {
        let compiler = compiler();
        let new = tempfile::Builder::new().suffix(".so").tempfile_in(&folder).unwrap().into_temp_path();
        let output = Command::new(&compiler)
            .args(["-x", "c++", "-std=c++17", "-O2", "-DEMU", "-shared", "-fPIC", "-ffp-contract=off", "-o"])
            .arg(&new)
            .arg(sources.join(format!("{file}.cu")))
            .output()
            .unwrap_or_else(|e| panic!("the tests of GPU kernels need a C++ compiler ({compiler}): {e}"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        new.persist(&path).unwrap();
    }
    path
}
