"""Times torch.topk as a sparse codec uses it: magnitudes, the k largest, their values gathered; one CPU thread.

Prints one line per tensor and share, in GB/s of f32 input, medians over rounds. The tensors are those of
`cargo bench -p fusionllm-codec`: Gaussian, one channel in 128 twenty times as large. `select` is torch.topk on
magnitudes made beforehand, `encode` adds making them and gathering the values (as int64 index and f32 value: no
packing is counted), `decode` is zero fill and scatter.
"""

import argparse
import statistics
import time

import torch


def median_s(run, rounds):
    """Median wall seconds of `run`, after one call to warm up."""
    run()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(1)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread, GB/s of f32 input")
    for shape in [(4, 1024, 1024), (1, 1024, 768)]:
        x = torch.randn(shape)
        x[..., 7::128] *= 20
        flat = x.flatten()
        magnitudes = flat.abs()
        for share in [0.001, 0.01, 0.05, 0.1, 0.3]:
            k = -(-flat.numel() * round(share * 1e6) // 1_000_000)

            def encode():
                index = flat.abs().topk(k, sorted=False).indices
                return index, flat[index]

            index, values = encode()
            select = median_s(lambda: magnitudes.topk(k, sorted=False), rounds)
            whole = median_s(encode, rounds)
            decode = median_s(lambda: torch.zeros_like(flat).scatter_(0, index, values), rounds)
            rate = [4e-9 * flat.numel() / t for t in (select, whole, decode)]
            print(f"{list(shape)} {share}: select {rate[0]:.3f} encode {rate[1]:.3f} decode {rate[2]:.2f}")


if __name__ == "__main__":
    main()
