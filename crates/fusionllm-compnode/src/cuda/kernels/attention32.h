#pragma once
#include "inputs.h"

// f32 attention without a matrix of scores in memory (FlashAttention-2: Dao, arXiv 2307.08691), computed by FMA alone.
//
// A launch: 128 threads a block, grid = (ceil(seq / 64), batch * heads); 48 KB of shared memory.

constexpr float LOG2_E = 1.44269504f;

// Products of tiles of 64 x 64 floats by 128 threads. A warp has 16 rows of a product, a thread 8 rows and 4 columns:
// rows row..row+8, columns 4 * column..4 * column+4. Bit 1 of the lane chooses the rows, the other bits the columns, so
// that each 16-byte load of a warp takes few passes: of four neighboring lanes two read the same address.
//
// In shared memory a tile's row has 16 chunks of 16 bytes, whose order depends on the row. Offsets are in bytes; the
// offset of chunk k is that of chunk 0 ^ 16 * k.
constexpr int TILE = 64 * 64, ROW = 256;
DEV int chunk_offset(int row, int chunk) { return row * ROW + ((chunk ^ (row >> 2 & 7)) << 4); }
DEV const float* chunk_at(const float* tile, int offset) { return (const float*)((const char*)tile + offset); }
DEV float* chunk_at(float* tile, int offset) { return (float*)((char*)tile + offset); }
struct Place {
    int row, column;
    int rows;     // offset of chunk 0 of the first of the thread's rows
    int columns;  // offset of chunk 0 of the first row whose number is one of the thread's columns
};
DEV Place place() {
    const int lane = threadIdx.x % 32;
    Place at;
    at.row = threadIdx.x / 32 * 16 + (lane >> 1 & 1) * 8;
    at.column = (lane & 1) + (lane >> 3 & 1) * 2 + (lane >> 2 & 1) * 4 + (lane >> 4) * 8;
    at.rows = chunk_offset(at.row, 0);
    at.columns = chunk_offset(at.column * 4, 0);
    return at;
}
// Where chunk k of row i (0..8) of the thread's rows lies.
DEV int row_chunk(const Place& at, int i, int k) { return (at.rows ^ ((k ^ (i >> 2)) << 4)) + i * ROW; }
// sums += x y^T
DEV void add_dots(float (*sums)[4], const float* x, const float* y, const Place& at) {
#pragma unroll 1
    for (int k = 0; k < 16; k += 2)
#pragma unroll
        for (int n = k; n < k + 2; n++) {
            float v[4][4], u[4];
#pragma unroll
            for (int j = 0; j < 4; j++) load16(v[j], chunk_at(y, (at.columns ^ (n << 4)) + j * ROW));
#pragma unroll
            for (int i = 0; i < 8; i++) {
                load16(u, chunk_at(x, row_chunk(at, i, n)));
#pragma unroll
                for (int l = 0; l < 4; l++)
#pragma unroll
                    for (int j = 0; j < 4; j++) sums[i][j] += u[l] * v[j][l];
            }
        }
}
// sums += x y, over the rows 4 * from..4 * to of y; both are even.
DEV void add_product(float (*sums)[4], const float* x, const float* y, const Place& at, int from, int to) {
#pragma unroll 1
    for (int k = from; k < to; k += 2)
#pragma unroll
        for (int n = k; n < k + 2; n++) {
            float v[4][4], u[4];
#pragma unroll
            for (int j = 0; j < 4; j++) load16(v[j], chunk_at(y, chunk_offset(4 * n, at.column) + j * ROW));
#pragma unroll
            for (int i = 0; i < 8; i++) {
                load16(u, chunk_at(x, row_chunk(at, i, n)));
#pragma unroll
                for (int j = 0; j < 4; j++)
#pragma unroll
                    for (int l = 0; l < 4; l++) sums[i][l] += u[j] * v[j][l];
            }
        }
}
// Starts copying 64 rows of a tensor, from row `first`; rows from `end` on become zeros. Each warp copies the rows that
// it has of a product. Before sm_80 the copy is done at once.
DEV void copy_tile(float* tile, const float* g, u32 stride, int first, int end) {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x / 16 % 2, chunk = threadIdx.x % 16;
    const int offset = chunk_offset(row, chunk), left = end - first - row;
    const float* from = g + (u64)(u32)(first + row) * stride + chunk * 4;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float* to = chunk_at(tile, (offset ^ ((i >> 1) << 4)) + i * 2 * ROW);
#if defined(EMU) || __CUDA_ARCH__ >= 800
        cp16z(to, from, 2 * i < left);
#else
        *(Words4*)to = 2 * i < left ? fixed16(from) : Words4{};
#endif
        from += (u64)stride * 2;
    }
#if defined(EMU) || __CUDA_ARCH__ >= 800
    cp_commit();
#endif
}
// Waits until at most N of the thread's copies are under way.
template <int N> DEV void wait_tiles() {
#if defined(EMU) || __CUDA_ARCH__ >= 800
    cp_wait<N>();
#endif
}

// Blocks start in the order of blockIdx.x, then y. This gives each its place in the order of work, longest first, with
// the middle third turned round: where all blocks run at once, three on a multiprocessor, those then have about the
// same work in all.
DEV u32 work_order() {
    const u32 order = blockIdx.y * gridDim.x + blockIdx.x, third = gridDim.x * gridDim.y / 3;
    return order - third < third ? 3 * third - 1 - order : order;
}

// out = softmax(q k^T * scale) v, a block for 64 queries of one head, and the log-sum-exp of each query's scores. The
// maximum and the sum of each query are kept over the tiles of keys and the output scaled at the end. The probabilities
// take the place of the tile of k; while they are computed, the tile of v is copied.
template <class A> DEV void attention(const A& a) {
    __shared__ __align__(128) float q_tile[TILE];
    __shared__ __align__(128) float k_tile[TILE];
    __shared__ __align__(128) float v_tile[TILE];
    const Place at = place();
    const int seq = (int)a.seq, heads = (int)a.heads;
    // With a causal mask the last queries have the most keys: those of all heads go first.
    const u32 order = work_order(), pair = order % gridDim.y;
    const int first_query = (int)(gridDim.x - 1 - order / gridDim.y) * 64, query = first_query + at.row;
    const int warp_end = first_query + (at.row & ~15) + 16;
    const int batch = (int)pair / heads, head = (int)pair % heads;
    const int keys = a.causal ? min(first_query + 64, seq) : seq, tiles = (keys + 63) / 64;
    const u32 part = heads * 64, stride = (A::GROUPED ? 1 : 3) * part;
    const u32 kv_stride = kv_step<64>(a, stride);
    const float* q = queries(a) + (size_t)batch * seq * stride + (size_t)head * 64;
    const float* k = key_place<64>(a, q + part, (size_t)batch * seq, head);
    const float* v = value_place<64>(a, k + part, (size_t)batch * seq, head);
    const float minus_infinity = bits_f32(0xff800000u), scale = a.scale * LOG2_E;

    float acc[8][4] = {}, top[8], sum[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        top[i] = minus_infinity;
        sum[i] = 0.f;
    }
    copy_tile(q_tile, q, stride, first_query, seq);
    copy_tile(k_tile, k, kv_stride, 0, seq);
    for (int t = 0; t < tiles; t++) {
        const int first_key = t * 64, key = first_key + at.column * 4;
        copy_tile(v_tile, v, kv_stride, first_key, seq);
        wait_tiles<1>();
        __syncthreads();
        float s[8][4] = {};
        add_dots(s, q_tile, k_tile, at);
        // Only tiles on the diagonal and the last one have keys to hide.
        if (first_key + 64 > seq || (a.causal && first_key + 64 > first_query)) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int end = a.causal ? min(query + i + 1, seq) : seq;
#pragma unroll
                for (int j = 0; j < 4; j++) s[i][j] = key + j < end ? s[i][j] : minus_infinity;
            }
        }
        // Every query sees key 0, so after the first tile the maximum is a number.
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float most = fmaxf(fmaxf(s[i][0], s[i][1]), fmaxf(s[i][2], s[i][3]));
            most = fmaxf(most, shfl_xor(most, 1));
            most = fmaxf(most, shfl_xor(most, 4));
            most = fmaxf(most, shfl_xor(most, 8));
            most = fmaxf(fmaxf(most, shfl_xor(most, 16)), top[i]);
            const float shrink = exp2_fast((top[i] - most) * scale);
            top[i] = most;
            float more = 0.f;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[i][j] = exp2_fast((s[i][j] - most) * scale);
                more += s[i][j];
                acc[i][j] *= shrink;
            }
            sum[i] = sum[i] * shrink + more;
        }
        // After the barrier the tile of v is there for all warps, and none reads the tile of k any more.
        wait_tiles<0>();
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; i++) store16(chunk_at(k_tile, row_chunk(at, i, at.column)), s[i]);
        __syncwarp();
        add_product(acc, k_tile, v_tile, at, 0, a.causal ? min((warp_end - first_key) / 4, 16) : 16);
        // A warp reads its own rows of probabilities only, so it may put new keys there before the others are done.
        __syncwarp();
        if (t + 1 < tiles) copy_tile(k_tile, k, kv_stride, first_key + 64, seq);
        __syncthreads();
    }
    float* out = a.out + ((size_t)batch * seq * heads + head) * 64 + at.column * 4;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float total = sum[i];
        total += shfl_xor(total, 1);
        total += shfl_xor(total, 4);
        total += shfl_xor(total, 8);
        total += shfl_xor(total, 16);
        const float inverse = 1.f / total;
        if (query + i >= seq) continue;
        if (a.lse && at.column == 0) a.lse[pair * a.seq + query + i] = top[i] * a.scale + logf(total);
#pragma unroll
        for (int j = 0; j < 4; j++) acc[i][j] *= inverse;
        store16(out + (u64)(u32)(query + i) * part, acc[i]);
    }
}
