#pragma once
#include "inputs.h"

// Gradients of attention32.cu's attention, f32 (FlashAttention-2: Dao, arXiv 2307.08691). The probabilities are
// computed again from the log-sum-exp that the forward kept: p = exp(q k^T * scale - lse), ds = p * (d_out v^T - dot),
// and then d_v = p^T d_out, d_k = ds^T q * scale, d_q = ds k * scale. Keys and queries have a kernel each: every sum
// has a fixed order, at the price of computing p and ds twice.
//
// Launches, of 128 threads a block (shared memory: 48 KB, none for attention_dot):
//   attention_dot      any grid; best ceil(batch * seq * heads * 64 / 1024) blocks
//   attention_kv_grad  grid = (ceil(seq / 64), batch * heads of keys), 64 keys a block
//   attention_q_grad   grid = (ceil(seq / 64), batch * heads), 64 queries a block
// Three tiles fit in shared memory, so these two load a tile again where another had taken its place.

constexpr float LOG2_E = 1.44269504f;

// Products of tiles of 64 x 64 floats by 128 threads, as in attention32.cu. A warp has 16 rows of a product, a thread 8
// rows and 4 columns: rows row..row+8, columns 4 * column..4 * column+4. Bit 1 of the lane chooses the rows, the other
// bits the columns, so that each 16-byte load of a warp takes few passes: of four neighboring lanes two read the same
// address.
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
// sums += x y^T (not unrolled over k, for want of registers)
DEV void add_dots(float (*sums)[4], const float* x, const float* y, const Place& at) {
#pragma unroll 1
    for (int k = 0; k < 16; k++) {
        float v[4][4], u[4];
#pragma unroll
        for (int j = 0; j < 4; j++) load16(v[j], chunk_at(y, (at.columns ^ (k << 4)) + j * ROW));
#pragma unroll
        for (int i = 0; i < 8; i++) {
            load16(u, chunk_at(x, row_chunk(at, i, k)));
#pragma unroll
            for (int l = 0; l < 4; l++)
#pragma unroll
                for (int j = 0; j < 4; j++) sums[i][j] += u[l] * v[j][l];
        }
    }
}
// sums += x y, over the rows 4 * from..4 * to of y.
DEV void add_product(float (*sums)[4], const float* x, const float* y, const Place& at, int from, int to) {
#pragma unroll 1
    for (int k = from; k < to; k++) {
        float v[4][4], u[4];
#pragma unroll
        for (int j = 0; j < 4; j++) load16(v[j], chunk_at(y, chunk_offset(4 * k, at.column) + j * ROW));
#pragma unroll
        for (int i = 0; i < 8; i++) {
            load16(u, chunk_at(x, row_chunk(at, i, k)));
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int l = 0; l < 4; l++) sums[i][l] += u[j] * v[j][l];
        }
    }
}
// Starts copying 64 rows of a tensor, from row `first`; rows from `end` on become zeros. Each warp copies the rows that
// it has of a product. Before sm_80 the copy is done at once. (Unrolled, copies keep many addresses in registers.)
DEV void copy_tile(float* tile, const float* g, u32 stride, int first, int end) {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x / 16 % 2, chunk = threadIdx.x % 16;
    const int offset = chunk_offset(row, chunk), left = end - first - row;
    const float* from = g + (u64)(u32)(first + row) * stride + chunk * 4;
#pragma unroll 2
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

// Writes a thread's rows and columns of a product, times a factor; `g` is row `first` of the tensor, 0 of the product.
DEV void store_tile(float (*sums)[4], float factor, float* g, u32 stride, int first, int end, const Place& at) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (first + at.row + i >= end) continue;
#pragma unroll
        for (int j = 0; j < 4; j++) sums[i][j] *= factor;
        store16(g + (u64)(u32)(at.row + i) * stride + at.column * 4, sums[i]);
    }
}
// Puts a thread's rows and columns of a product into a tile.
DEV void keep_tile(float* tile, const float (*sums)[4], const Place& at) {
#pragma unroll
    for (int i = 0; i < 8; i++) store16(chunk_at(tile, row_chunk(at, i, at.column)), sums[i]);
}

// Blocks start in the order of blockIdx.x, then y. This gives each its place in the order of work, longest first, with
// the middle third turned round: where all blocks run at once, three on a multiprocessor, those then have about the
// same work in all.
DEV u32 work_order() {
    const u32 order = blockIdx.y * gridDim.x + blockIdx.x, third = gridDim.x * gridDim.y / 3;
    return order - third < third ? 3 * third - 1 - order : order;
}

// dot[b, h, s] = sum of out * d_out over a head's values: what softmax's gradient subtracts. Eight lanes have a row.
DEV void attention_dot(const attention_dot_args<float>& a) {
    const size_t rows = (size_t)a.batch * a.seq * a.heads, step = (size_t)gridDim.x * gridDim.y * 16;
    const int lane = threadIdx.x % 8;
    for (size_t first = ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * 16; first < rows; first += step) {
        const size_t row = first + threadIdx.x / 8;
        float sum = 0.f;
        if (row < rows) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const size_t at = row * 64 + half * 32 + lane * 4;
                float x[4], y[4];
                load16(x, a.out + at);
                load16(y, a.d_out + at);
#pragma unroll
                for (int i = 0; i < 4; i++) sum += x[i] * y[i];
            }
        }
#pragma unroll
        for (int m = 4; m; m >>= 1) sum += shfl_xor(sum, m);
        if (row < rows && lane == 0) {
            const size_t head = row % a.heads, position = row / a.heads;
            a.dot[(position / a.seq * a.heads + head) * a.seq + position % a.seq] = sum;
        }
    }
}

// d_k and d_v of 64 keys of one head, summed over the heads of queries that it serves, one after the other. Products
// are transposed, keys by queries, so that the rows of the left factors (k, v, p and ds) are a warp's own and need no
// barrier.
template <class A> DEV void attention_kv_grad(const A& a) {
    __shared__ __align__(128) float key_tile[TILE];    // k, then v
    __shared__ __align__(128) float inner_tile[TILE];  // q, then p, then ds
    __shared__ __align__(128) float query_tile[TILE];  // d_out, then q
    const Place at = place();
    const int seq = (int)a.seq, heads = (int)a.heads, kv = (int)kv_heads(a);
    // With a causal mask the first keys have the most queries: those of all heads go first.
    const u32 order = work_order(), pair = order % gridDim.y;
    const int first_key = (int)(order / gridDim.y) * 64, key = first_key + at.row;
    const int batch = (int)pair / kv, head = first_served(a, (int)pair % kv), tiles = (seq + 63) / 64;
    const u32 part = heads * 64, stride = (A::GROUPED ? 1 : 3) * part;
    const u32 kv_stride = kv_step<64>(a, stride);
    const size_t start = (size_t)batch * seq * stride + (size_t)head * 64;
    const float* q = queries(a) + start;
    const float* g = a.d_out + (size_t)batch * seq * part + (size_t)head * 64;

    float dk[8][4] = {}, dv[8][4] = {};
    int first_query = a.causal ? first_key : 0;
    u32 rows = served(a) * pair * a.seq, left = served(a);
    copy_tile(key_tile, key_place<64>(a, q + part, (size_t)batch * seq, head), kv_stride, first_key, seq);
    copy_tile(inner_tile, q, stride, first_query, seq);
    for (; A::GROUPED ? left > 0 : first_query < tiles * 64; first_query += 64) {
        const bool at_end = first_query + 64 >= seq, more = !at_end || (A::GROUPED && left > 1);
        const bool diagonal = a.causal && first_query == first_key;
        const int query = first_query + at.column * 4, from = diagonal ? (at.row & ~15) / 4 : 0;
        copy_tile(query_tile, A::GROUPED ? a.d_out + (q - queries(a)) : g, part, first_query, seq);
        // Queries past the end have zeros in q and d_out and so add nothing, as long as their p is a number: it is 1
        // with a log-sum-exp of 0.
        float lse[4], dot[4];
#pragma unroll
        for (int j = 0; j < 4; j++) lse[j] = query + j < seq ? a.lse[rows + query + j] : 0.f;
        wait_tiles<1>();
        __syncthreads();
        float s[8][4] = {};
        add_dots(s, key_tile, inner_tile, at);
        __syncwarp();
        copy_tile(key_tile, value_place<64>(a, q + 2 * part, (size_t)batch * seq, head), kv_stride, first_key, seq);
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[i][j] = exp2_fast((s[i][j] * a.scale - lse[j]) * LOG2_E);
                if (diagonal && query + j < key + i) s[i][j] = 0.f;
            }
        // After the barrier d_out is there for all warps, and none reads q any more.
        wait_tiles<1>();
        __syncthreads();
        keep_tile(inner_tile, s, at);
        __syncwarp();
        add_product(dv, inner_tile, query_tile, at, from, 16);
#pragma unroll
        for (int j = 0; j < 4; j++) dot[j] = query + j < seq ? a.dot[rows + query + j] : 0.f;
        wait_tiles<0>();
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) s[i][j] = -dot[j];
        add_dots(s, key_tile, query_tile, at);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float p[4];
            load16(p, chunk_at(inner_tile, row_chunk(at, i, at.column)));
#pragma unroll
            for (int j = 0; j < 4; j++) s[i][j] *= p[j];
        }
        keep_tile(inner_tile, s, at);
        // After the first barrier no warp reads d_out any more, after the second q is there.
        __syncthreads();
        copy_tile(query_tile, q, stride, first_query, seq);
        if (more) {
            copy_tile(key_tile, key_place<64>(a, q + part, (size_t)batch * seq, head), kv_stride, first_key, seq);
            wait_tiles<1>();
        } else
            wait_tiles<0>();
        __syncthreads();
        add_product(dk, inner_tile, query_tile, at, from, 16);
        __syncwarp();
        if (A::GROUPED && at_end) {
            first_query = (a.causal ? first_key : 0) - 64;
            q += 64;
            rows += a.seq;
            left--;
        }
        if (more) copy_tile(inner_tile, q, stride, first_query + 64, seq);
        __syncthreads();
    }
    const size_t position = (size_t)batch * seq + first_key;
    float* to = d_queries(a) + start + part + (size_t)first_key * stride;
    store_tile(dk, a.scale, d_key_place<64>(a, to, position, head), kv_stride, first_key, seq, at);
    store_tile(dv, 1.f, d_value_place<64>(a, to + part, position, head), kv_stride, first_key, seq, at);
}

// d_q of 64 queries of one head. The rows of the left factors (q, d_out and ds) are a warp's own and need no barrier.
template <class A> DEV void attention_q_grad(const A& a) {
    __shared__ __align__(128) float query_tile[TILE];  // q, then d_out, then ds
    __shared__ __align__(128) float k_tile[TILE];
    __shared__ __align__(128) float v_tile[TILE];
    const Place at = place();
    const int seq = (int)a.seq, heads = (int)a.heads;
    // With a causal mask the last queries have the most keys: those of all heads go first.
    const u32 order = work_order(), pair = order % gridDim.y;
    const int first_query = (int)(gridDim.x - 1 - order / gridDim.y) * 64, query = first_query + at.row;
    const int warp_end = first_query + (at.row & ~15) + 16;
    const int batch = (int)pair / heads, head = (int)pair % heads;
    const int keys = a.causal ? min(first_query + 64, seq) : seq;
    const u32 part = heads * 64, stride = (A::GROUPED ? 1 : 3) * part;
    const u32 kv_stride = kv_step<64>(a, stride);
    const size_t start = (size_t)batch * seq * stride + (size_t)head * 64;
    const float* q = queries(a) + start;
    const float* g = a.d_out + (size_t)batch * seq * part + (size_t)head * 64;

    float dq[8][4] = {};
    copy_tile(query_tile, q, stride, first_query, seq);
    copy_tile(k_tile, key_place<64>(a, q + part, (size_t)batch * seq, head), kv_stride, 0, seq);
    for (int first_key = 0; first_key < keys; first_key += 64) {
        const int key = first_key + at.column * 4;
        copy_tile(v_tile, value_place<64>(a, q + 2 * part, (size_t)batch * seq, head), kv_stride, first_key, seq);
        wait_tiles<1>();
        __syncthreads();
        float p[8][4] = {}, ds[8][4];
        add_dots(p, query_tile, k_tile, at);
        __syncwarp();
        copy_tile(query_tile, g, part, first_query, seq);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const u32 row = pair * a.seq + min(query + i, seq - 1);
            const float lse = a.lse[row], dot = a.dot[row];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                p[i][j] = exp2_fast((p[i][j] * a.scale - lse) * LOG2_E);
                ds[i][j] = -dot;
            }
        }
        // Only tiles on the diagonal and the last one have keys to hide.
        if (first_key + 64 > seq || (a.causal && first_key + 64 > first_query)) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int end = a.causal ? min(query + i + 1, seq) : seq;
#pragma unroll
                for (int j = 0; j < 4; j++) p[i][j] = key + j < end ? p[i][j] : 0.f;
            }
        }
        wait_tiles<0>();
        __syncthreads();
        add_dots(ds, query_tile, v_tile, at);
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) ds[i][j] *= p[i][j];
        __syncwarp();
        keep_tile(query_tile, ds, at);
        __syncwarp();
        add_product(dq, query_tile, k_tile, at, 0, a.causal ? min((warp_end - first_key) / 4, 16) : 16);
        __syncwarp();
        if (first_key + 64 < keys) copy_tile(query_tile, q, stride, first_query, seq);
        __syncthreads();
        if (first_key + 64 < keys)
            copy_tile(k_tile, key_place<64>(a, q + part, (size_t)batch * seq, head), kv_stride, first_key + 64, seq);
    }
    store_tile(dq, a.scale, d_queries(a) + start + (size_t)first_query * stride, stride, first_query, seq, at);
}
