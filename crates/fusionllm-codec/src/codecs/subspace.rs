//! Rows in an orthonormal basis: projecting, rebuilding, and finding the basis that misses least.
//!
//! A basis is `vectors`: its vectors of `width` numbers, one after the other. Coefficients are ordered by vector,
//! then by row, so that numbers of like size are neighbours. All sums have a fixed order: both ends of an edge,
//! and every run, compute the same bits.

use multiversion::multiversion;

/// Partial sums of a dot product.
const LANES: usize = 16;
/// Vectors that are worked on together, to read each row less often.
const GROUP: usize = 4;
/// Rows that are worked on together, to read the vectors less often.
const TILE: usize = 32;
/// A vector that loses this share of its length to the others holds little but rounding errors.
const DEPENDENT: f64 = 1e-5;

/// Replaces `into` by the coefficients of the rows of `x`.
pub(crate) fn project(x: &[f32], width: usize, vectors: &[f32], into: &mut Vec<f32>) {
    let (rows, rank) = (x.len() / width, vectors.len() / width);
    into.clear();
    into.resize(rows * rank, 0.0);
    for (tile, first) in x.chunks(TILE * width).zip((0..).step_by(TILE)) {
        project_tile(tile, first, rows, width, vectors, into);
    }
}

/// As [`project`], of rows from `first` on, which stay in the cache while all vectors pass.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn project_tile(tile: &[f32], first: usize, rows: usize, width: usize, vectors: &[f32], into: &mut [f32]) {
    let groups = vectors.chunks_exact(GROUP * width);
    let left = groups.remainder();
    for (j, group) in groups.clone().enumerate() {
        let pairs = tile.chunks_exact(2 * width);
        let odd = pairs.remainder();
        for (pair, i) in pairs.clone().zip((first..).step_by(2)) {
            let (a, b) = pair.split_at(width);
            for ((sum_a, sum_b), j) in eight_dots(a, b, group).into_iter().zip(j * GROUP..) {
                into[j * rows + i] = sum_a;
                into[j * rows + i + 1] = sum_b;
            }
        }
        if !odd.is_empty() {
            let i = first + 2 * pairs.len();
            for ((sum, _), j) in eight_dots(odd, odd, group).into_iter().zip(j * GROUP..) {
                into[j * rows + i] = sum;
            }
        }
    }
    for (vector, j) in left.chunks_exact(width).zip(rank_of(vectors, width) / GROUP * GROUP..) {
        for (row, i) in tile.chunks_exact(width).zip(first..) {
            into[j * rows + i] = dot(row, vector);
        }
    }
}

#[inline(always)]
fn rank_of(vectors: &[f32], width: usize) -> usize {
    vectors.len() / width
}

/// Products of two rows with the [`GROUP`] vectors of `group`. Written out, for the sums to stay in registers.
#[inline(always)]
fn eight_dots(p: &[f32], q: &[f32], group: &[f32]) -> [(f32, f32); GROUP] {
    let (ab, cd) = group.split_at(2 * p.len());
    let ((a, b), (c, d)) = (ab.split_at(p.len()), cd.split_at(p.len()));
    let ((x, rest_x), (y, rest_y)) = (p.as_chunks::<LANES>(), q.as_chunks::<LANES>());
    let chunks = [a, b, c, d].map(|vector| vector.as_chunks::<LANES>().0);
    let [mut pa, mut pb, mut pc, mut pd] = [[0.0; LANES]; GROUP];
    let [mut qa, mut qb, mut qc, mut qd] = [[0.0; LANES]; GROUP];
    let vectors = chunks[0].iter().zip(chunks[1]).zip(chunks[2]).zip(chunks[3]);
    for ((x, y), (((a, b), c), d)) in x.iter().zip(y).zip(vectors) {
        for lane in 0..LANES {
            pa[lane] += x[lane] * a[lane];
            pb[lane] += x[lane] * b[lane];
            pc[lane] += x[lane] * c[lane];
            pd[lane] += x[lane] * d[lane];
            qa[lane] += y[lane] * a[lane];
            qb[lane] += y[lane] * b[lane];
            qc[lane] += y[lane] * c[lane];
            qd[lane] += y[lane] * d[lane];
        }
    }
    let whole = p.len() - rest_x.len();
    let sum = |lanes: [f32; LANES], rest: &[f32], vector: &[f32]| {
        lanes.iter().sum::<f32>() + short_dot(rest, &vector[whole..])
    };
    let both = |p, q, vector| (sum(p, rest_x, vector), sum(q, rest_y, vector));
    [both(pa, qa, a), both(pb, qb, b), both(pc, qc, c), both(pd, qd, d)]
}

#[inline(always)]
fn dot(row: &[f32], vector: &[f32]) -> f32 {
    let ((x, rest_x), (v, rest_v)) = (row.as_chunks::<LANES>(), vector.as_chunks::<LANES>());
    let mut sums = [0.0; LANES];
    for (x, v) in x.iter().zip(v) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * v[lane];
        }
    }
    sums.iter().sum::<f32>() + short_dot(rest_x, rest_v)
}

#[inline(always)]
fn short_dot(x: &[f32], v: &[f32]) -> f32 {
    x.iter().zip(v).map(|(x, v)| x * v).sum()
}

/// Replaces `into` by the rows that have these coefficients.
pub(crate) fn rebuild(coefficients: &[f32], rows: usize, width: usize, vectors: &[f32], into: &mut Vec<f32>) {
    into.clear();
    into.resize(rows * width, 0.0);
    for (tile, first) in into.chunks_mut(TILE * width).zip((0..).step_by(TILE)) {
        rebuild_tile(coefficients, first, rows, width, vectors, tile);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn rebuild_tile(coefficients: &[f32], first: usize, rows: usize, width: usize, vectors: &[f32], tile: &mut [f32]) {
    let groups = vectors.chunks_exact(GROUP * width);
    let left = groups.remainder();
    for (j, group) in groups.enumerate() {
        let (ab, cd) = group.split_at(2 * width);
        let ((va, vb), (vc, vd)) = (ab.split_at(width), cd.split_at(width));
        for (row, i) in tile.chunks_exact_mut(width).zip(first..) {
            let [a, b, c, d] = std::array::from_fn(|k| coefficients[(j * GROUP + k) * rows + i]);
            // Most of what a low rate leaves is 0.
            if [a, b, c, d] == [0.0; GROUP] {
                continue;
            }
            for ((((x, va), vb), vc), vd) in row.iter_mut().zip(va).zip(vb).zip(vc).zip(vd) {
                *x += (a * va + b * vb) + (c * vc + d * vd);
            }
        }
    }
    for (vector, j) in left.chunks_exact(width).zip(rank_of(vectors, width) / GROUP * GROUP..) {
        for (row, i) in tile.chunks_exact_mut(width).zip(first..) {
            add_scaled(row, coefficients[j * rows + i], vector);
        }
    }
}

#[inline(always)]
fn add_scaled(row: &mut [f32], factor: f32, vector: &[f32]) {
    for (x, v) in row.iter_mut().zip(vector) {
        *x += factor * v;
    }
}

/// Sum of squares.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
pub(crate) fn square_sum(values: &[f32]) -> f64 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] += f64::from(chunk[lane]) * f64::from(chunk[lane]);
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>()
}

/// Makes the basis one of `rank` vectors, if it has less, by vectors that are the same everywhere.
pub(crate) fn extend(vectors: &mut Vec<f32>, width: usize, rank: usize) {
    let held = vectors.len();
    if held < width * rank {
        vectors.resize(width * rank, 0.0);
        fill(&mut vectors[held..], held as u64);
        orthonormalise(vectors, width);
    }
}

/// Turns the basis towards the directions in which the rows of `x` are longest: block power iterations.
pub(crate) fn refine(x: &[f32], width: usize, vectors: &mut [f32], iterations: usize, coefficients: &mut Vec<f32>) {
    let rows = x.len() / width;
    for _ in 0..iterations {
        project(x, width, vectors, coefficients);
        let largest = coefficients.iter().fold(0f32, |m, c| m.max(c.abs()));
        // A tensor of zeros has no directions.
        if largest == 0.0 {
            return;
        }
        vectors.fill(0.0);
        gather_rows(x, rows, width, coefficients, 1.0 / largest, vectors);
        orthonormalise(vectors, width);
    }
}

/// Adds each row, times its coefficients and `factor`, to the vectors.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn gather_rows(x: &[f32], rows: usize, width: usize, coefficients: &[f32], factor: f32, vectors: &mut [f32]) {
    for (i, row) in x.chunks_exact(width).enumerate() {
        for (j, vector) in vectors.chunks_exact_mut(width).enumerate() {
            add_scaled(vector, coefficients[j * rows + i] * factor, row);
        }
    }
}

/// Gram-Schmidt, each vector twice; one that depends on those before it is replaced by another start.
pub(crate) fn orthonormalise(vectors: &mut [f32], width: usize) {
    for j in 0..vectors.len() / width {
        let (done, rest) = vectors.split_at_mut(j * width);
        let vector = &mut rest[..width];
        // A random vector is independent enough: one of the attempts succeeds.
        for attempt in 1..=8 {
            let before = square_sum(vector).sqrt();
            for _ in 0..2 {
                for other in done.chunks_exact(width) {
                    take_out(vector, other);
                }
            }
            let after = square_sum(vector).sqrt();
            if after > DEPENDENT * before && after.is_finite() {
                vector.iter_mut().for_each(|x| *x = (f64::from(*x) / after) as f32);
                break;
            }
            fill(vector, (j as u64 + 1) << 8 | attempt);
        }
    }
}

/// Takes out of a vector what it shares with another of length 1.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn take_out(vector: &mut [f32], other: &[f32]) {
    add_scaled(vector, -dot(vector, other), other);
}

/// Numbers from -1 to 1 that follow from the seed (SplitMix64).
fn fill(values: &mut [f32], seed: u64) {
    let mut state = seed;
    for value in values {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = state;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        *value = (bits >> 40) as f32 / (1 << 23) as f32 - 1.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(width: usize, rank: usize) -> Vec<f32> {
        let mut vectors = Vec::new();
        extend(&mut vectors, width, rank);
        vectors
    }

    fn gram_is_identity(vectors: &[f32], width: usize) {
        for (i, a) in vectors.chunks_exact(width).enumerate() {
            for (j, b) in vectors.chunks_exact(width).enumerate() {
                let dot: f64 = a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-5, "{i} {j}: {dot}");
            }
        }
    }

    #[test]
    fn vectors_are_orthonormal_even_where_they_were_equal() {
        let mut vectors = start(37, 20);
        extend(&mut vectors, 37, 37);
        gram_is_identity(&vectors, 37);
        let mut equal = vec![1.0; 6 * 20];
        orthonormalise(&mut equal, 20);
        gram_is_identity(&equal, 20);
        let mut zeros = vec![0.0; 3 * 3];
        orthonormalise(&mut zeros, 3);
        gram_is_identity(&zeros, 3);
    }

    #[test]
    fn rows_of_low_rank_are_found_and_rebuilt() {
        let (rows, width, rank) = (50, 33, 6);
        let mut factors = vec![0.0; (rows + width) * rank];
        fill(&mut factors, 5);
        let (left, right) = factors.split_at(rows * rank);
        let mut x = Vec::new();
        rebuild(left, rows, width, right, &mut x);
        let (mut vectors, mut coefficients, mut back) = (start(width, rank), Vec::new(), Vec::new());
        refine(&x, width, &mut vectors, 2, &mut coefficients);
        project(&x, width, &vectors, &mut coefficients);
        rebuild(&coefficients, rows, width, &vectors, &mut back);
        assert!(x.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1e-4));
        let lost = 1.0 - square_sum(&coefficients) / square_sum(&x);
        assert!(lost.abs() < 1e-6, "{lost}");
    }
}
