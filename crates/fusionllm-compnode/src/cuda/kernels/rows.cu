#include "dev.h"

// into [.., dim] += from [.., dim] in the listed rows, and those rows of `from` become zero. A block a row.
struct add_rows_args { float* into; float* from; const u32* rows; u32 dim; };
KERNEL(add_rows, add_rows_args, 128) {
    size_t row = (size_t)a.rows[blockIdx.x] * a.dim;
    for (u32 c = threadIdx.x; c < a.dim; c += 128) {
        a.into[row + c] += a.from[row + c];
        a.from[row + c] = 0.f;
    }
}

// into [.., dim] += values [listed rows, dim] in the listed rows, each of which occurs once. A block a row.
struct add_listed_args { float* into; const float* values; const u32* rows; u32 dim; };
KERNEL(add_listed, add_listed_args, 128) {
    size_t row = (size_t)a.rows[blockIdx.x] * a.dim, at = (size_t)blockIdx.x * a.dim;
    for (u32 c = threadIdx.x; c < a.dim; c += 128) a.into[row + c] += a.values[at + c];
}

// out [listed rows, dim] = the listed rows of x [.., dim]. A block a row.
struct gather_rows_args { const float* x; const u32* rows; float* out; u32 dim; };
KERNEL(gather_rows, gather_rows_args, 128) {
    size_t row = (size_t)a.rows[blockIdx.x] * a.dim, at = (size_t)blockIdx.x * a.dim;
    for (u32 c = threadIdx.x; c < a.dim; c += 128) a.out[at + c] = a.x[row + c];
}
