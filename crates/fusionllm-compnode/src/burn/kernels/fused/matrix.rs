//! Products of matrices that lie in slices, by faer.

use faer::Par;
use faer::linalg::matmul::matmul;
pub(super) use faer::{Accum, MatMut, MatRef};

/// Row after row, without gaps.
///
/// # Panics
/// If there are not so many values.
pub(super) fn dense(values: &[f32], rows: usize, columns: usize) -> MatRef<'_, f32> {
    strided(values, rows, columns, columns)
}

/// Rows that begin `row_stride` apart.
///
/// # Panics
/// If the last element lies outside `values`.
pub(super) fn strided(values: &[f32], rows: usize, columns: usize, row_stride: usize) -> MatRef<'_, f32> {
    MatRef::from_column_major_slice_with_stride(values, columns, rows, row_stride).transpose()
}

/// As [`dense`], to be written.
///
/// # Panics
/// If there are not so many values.
pub(super) fn dense_mut(values: &mut [f32], rows: usize, columns: usize) -> MatMut<'_, f32> {
    strided_mut(values, rows, columns, columns)
}

/// As [`strided`], to be written.
///
/// # Panics
/// If the last element lies outside `values`, or rows overlap.
pub(super) fn strided_mut(values: &mut [f32], rows: usize, columns: usize, row_stride: usize) -> MatMut<'_, f32> {
    MatMut::from_column_major_slice_with_stride_mut(values, columns, rows, row_stride).transpose_mut()
}

/// `a · b` row after row, on all threads.
///
/// # Panics
/// If the shapes do not fit.
pub(super) fn new_product(a: MatRef<'_, f32>, b: MatRef<'_, f32>) -> Vec<f32> {
    let mut out = vec![0.0; a.nrows() * b.ncols()];
    product_into(a, b, dense_mut(&mut out, a.nrows(), b.ncols()));
    out
}

/// `out ← a · b`, on all threads.
///
/// # Panics
/// If the shapes do not fit.
pub(super) fn product_into(a: MatRef<'_, f32>, b: MatRef<'_, f32>, out: MatMut<'_, f32>) {
    matmul(out, Accum::Replace, a, b, 1.0, on_all_threads());
}

/// `out ← out + a · b`, on all threads.
///
/// # Panics
/// If the shapes do not fit.
pub(super) fn add_product(a: MatRef<'_, f32>, b: MatRef<'_, f32>, out: MatMut<'_, f32>) {
    matmul(out, Accum::Add, a, b, 1.0, on_all_threads());
}

/// `out ← scale · a · b` or `out ← out + scale · a · b`, on this thread.
///
/// # Panics
/// If the shapes do not fit.
pub(super) fn small_product(scale: f32, a: MatRef<'_, f32>, b: MatRef<'_, f32>, out: MatMut<'_, f32>, accum: Accum) {
    matmul(out, accum, a, b, scale, Par::Seq);
}

/// The threads of the pool that this runs on.
fn on_all_threads() -> Par {
    Par::rayon(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_views_are_those_of_the_matrices_they_show() {
        let a: Vec<f32> = (0..12).map(|i| i as f32).collect();
        // Columns 1 and 2 of a 3 x 4 matrix, and the same transposed.
        let view = strided(&a[1..], 3, 2, 4);
        let mut out = [1.0; 9];
        small_product(2.0, view, view.transpose(), dense_mut(&mut out, 3, 3), Accum::Add);
        let rows = [[1.0, 2.0], [5.0, 6.0], [9.0, 10.0f32]];
        let expected: Vec<f32> =
            rows.iter().flat_map(|r| rows.iter().map(move |c| 1.0 + 2.0 * (r[0] * c[0] + r[1] * c[1]))).collect();
        assert_eq!(out.as_slice(), expected);
        // Into columns 1 to 3 of a 3 x 5 matrix.
        let mut wide = [7.0; 15];
        small_product(1.0, view, view.transpose(), strided_mut(&mut wide[1..], 3, 3, 5), Accum::Replace);
        let product = new_product(view, view.transpose());
        assert_eq!(product[4], 61.0);
        for (row, columns) in wide.chunks(5).enumerate() {
            assert_eq!((columns[0], &columns[1..4], columns[4]), (7.0, &product[3 * row..3 * row + 3], 7.0));
        }
        let mut sum = product.clone();
        add_product(view, view.transpose(), dense_mut(&mut sum, 3, 3));
        assert!(sum.iter().zip(&product).all(|(sum, p)| *sum == 2.0 * p));
        let none = dense(&[], 2, 0);
        assert_eq!(new_product(none, none.transpose()), [0.0; 4]);
    }

    #[test]
    #[should_panic(expected = "last < len")]
    fn a_view_beyond_its_slice_is_refused() {
        strided(&[0.0; 11], 3, 4, 4);
    }

    #[test]
    #[should_panic(expected = "lhs_ncols == rhs_nrows")]
    fn shapes_that_do_not_fit_are_refused() {
        let a = dense(&[0.0; 6], 2, 3);
        new_product(a, a);
    }
}
