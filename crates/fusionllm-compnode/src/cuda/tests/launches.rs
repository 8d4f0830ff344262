//! Where the time of a step goes, launch by launch, on a real GPU: `benches/gpu` prints it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use fusionllm_graph::{Gpt2Config, gpt2};
use fusionllm_protocol::Precision;

use super::{Trial, a_real_gpu, executor};
use crate::ExecutorError;
use crate::cuda::gpu::{Gpu, Kernel, Operands, Product};

/// Every launch is done so often in a row, since one is shorter than the clock can tell. What it adds to is wrong then.
const REPEATS: u32 = 10;

/// A GPU that times each launch.
#[derive(Debug)]
struct Timed {
    inner: Arc<dyn Gpu>,
    /// Launches and seconds, by what is launched.
    times: Mutex<BTreeMap<String, (u32, f64)>>,
}

impl Timed {
    fn time(&self, what: String, launch: impl Fn() -> Result<(), ExecutorError>) -> Result<(), ExecutorError> {
        self.inner.sync()?;
        let began = Instant::now();
        for _ in 0..REPEATS {
            launch()?;
        }
        self.inner.sync()?;
        let mut times = self.times.lock().unwrap();
        let entry = times.entry(what).or_default();
        *entry = (entry.0 + 1, entry.1 + began.elapsed().as_secs_f64() / f64::from(REPEATS));
        Ok(())
    }
}

impl Gpu for Timed {
    fn take(&self, bytes: usize) -> Result<u64, ExecutorError> {
        self.inner.take(bytes)
    }

    fn give_back(&self, address: u64, bytes: usize) {
        self.inner.give_back(address, bytes);
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), ExecutorError> {
        self.inner.upload(to, bytes)
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), ExecutorError> {
        self.inner.download(from, bytes)
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), ExecutorError> {
        self.inner.copy(from, to, bytes)
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<(), ExecutorError> {
        self.inner.zero(at, bytes)
    }

    fn launch(&self, kernel: Kernel, grid: [u32; 2], arguments: &[u8]) -> Result<(), ExecutorError> {
        self.time(kernel.name.to_owned(), || self.inner.launch(kernel, grid, arguments))
    }

    fn multiply(&self, product: &Product, operands: Operands) -> Result<(), ExecutorError> {
        let Product { m, n, k, batch, adds, bias, .. } = *product;
        let turned = [product.a.transposed, product.b.transposed].map(|t| if t { "T" } else { "N" }).concat();
        let more = [(adds, " adds"), (bias, " bias")].map(|(is, word)| if is { word } else { "" }).concat();
        let what = format!("product {m} x {n} x {k} ({batch}) {turned}{more}");
        self.time(what, || self.inner.multiply(product, operands))
    }

    fn sync(&self) -> Result<(), ExecutorError> {
        self.inner.sync()
    }

    fn trim(&self) {
        self.inner.trim();
    }

    fn prepare(&self, kernels: &[Kernel]) -> Result<(), ExecutorError> {
        self.inner.prepare(kernels)
    }
}

#[test]
#[ignore = "prints times, on a real GPU"]
fn time_per_launch() {
    let Some(device) = a_real_gpu() else { return };
    for (layers, vocab, seq, batch) in [(4, 8192, 256, 4), (12, 50257, 512, 4), (12, 50257, 1024, 32)] {
        for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
            if seq == 1024 && precision != Precision::Bf16 {
                continue;
            }
            let mut config = Gpt2Config::named("gpt2").unwrap();
            (config.n_layer, config.vocab_size, config.dropout) = (layers, vocab, 0.0);
            let dag = Arc::new(gpt2(&config, seq).unwrap());
            let timed = Arc::new(Timed { inner: Arc::clone(&device), times: Mutex::default() });
            let gpu = Arc::clone(&timed) as Arc<dyn Gpu>;
            let trial = Trial { precision, batch, micro_batches: 1, ..Trial::new(&dag) };
            let mut executors = trial.executors(&|spec| executor(spec, &gpu));
            trial.step(&mut executors, 0);
            timed.times.lock().unwrap().clear();
            trial.step(&mut executors, 1);
            let times = std::mem::take(&mut *timed.times.lock().unwrap());
            let total: f64 = times.values().map(|(_, seconds)| seconds).sum();
            println!("== {layers} layers, {batch} x {seq}, {precision:?}: {:.3} ms in all", total * 1e3);
            let mut times: Vec<_> = times.into_iter().collect();
            times.sort_by(|(_, (_, a)), (_, (_, b))| b.total_cmp(a));
            for (what, (count, seconds)) in times {
                println!("{:8.1} us {:5.1} % {count:4} x {what}", seconds * 1e6, 100.0 * seconds / total);
            }
        }
    }
}
