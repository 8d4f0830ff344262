#include "dev.h"

// partial [chunks] = the sum of squares of each 1024 elements of x. A warp a chunk: 8 chunks a block.
struct chunk_squares_args { const float* x; double* partial; u32 chunks; };
KERNEL(chunk_squares, chunk_squares_args, 256) {
    u32 chunk = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (chunk >= a.chunks) return;
    const float* x = a.x + (size_t)chunk * 1024;
    float sum = 0.f;
    for (u32 i = 0; i < 32; i++) {
        float v = x[i * 32 + lane];
        sum = fmaf(v, v, sum);
    }
    double total = sum;
    for (int step = 16; step; step >>= 1) total += shfl_xor(total, step);
    if (lane == 0) a.partial[chunk] = total;
}

// out [segments] = the sum of partial [starts[s], starts[s + 1]), in a fixed order. A block a segment.
struct segment_sums_args { const double* partial; const u32* starts; double* out; };
KERNEL(segment_sums, segment_sums_args, 256) {
    __shared__ double shared[8];
    double sum = 0;
    for (u32 i = a.starts[blockIdx.x] + threadIdx.x; i < a.starts[blockIdx.x + 1]; i += 256) sum += a.partial[i];
    sum = block_sum<256>(sum, shared);
    if (threadIdx.x == 0) a.out[blockIdx.x] = sum;
}
