//! Products of matrices that lie in slices, by the `gemm` crate.

use gemm::Parallelism;

/// A matrix in a slice: element (i, j) is at `i · row_stride + j · column_stride`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row after row, without gaps.
    pub(super) fn dense(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(values, rows, columns, columns)
    }

    /// Rows that begin `row_stride` apart.
    ///
    /// # Panics
    /// If the last element lies outside `values`.
    pub(super) fn strided(values: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(fits(values.len(), rows, columns, row_stride), "{rows} x {columns} outside {} values", values.len());
        Self { values, rows, columns, row_stride, column_stride: 1 }
    }

    /// Rows as columns, without moving anything.
    pub(super) fn transposed(self) -> Self {
        Self {
            values: self.values,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }
}

/// A matrix to be written, in rows.
#[derive(Debug)]
pub(super) struct MatrixMut<'a> {
    values: &'a mut [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
}

impl<'a> MatrixMut<'a> {
    /// Row after row, without gaps.
    pub(super) fn dense(values: &'a mut [f32], rows: usize, columns: usize) -> Self {
        Self::strided(values, rows, columns, columns)
    }

    /// Rows that begin `row_stride` apart.
    ///
    /// # Panics
    /// If the last element lies outside `values`, or rows overlap.
    pub(super) fn strided(values: &'a mut [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(fits(values.len(), rows, columns, row_stride), "{rows} x {columns} outside {} values", values.len());
        assert!(row_stride >= columns, "rows of {columns} overlap at stride {row_stride}");
        Self { values, rows, columns, row_stride }
    }
}

/// Whether a matrix lies within `len` values. Numbers that overflow do not.
fn fits(len: usize, rows: usize, columns: usize, row_stride: usize) -> bool {
    let (Some(last_row), Some(last_column)) = (rows.checked_sub(1), columns.checked_sub(1)) else { return true };
    last_row.checked_mul(row_stride).and_then(|start| start.checked_add(last_column)).is_some_and(|last| last < len)
}

/// What becomes of the values that a product's target holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// They are overwritten.
    Overwrite,
    /// The product is added.
    Add,
}

/// `a · b` row after row, on all threads.
///
/// # Panics
/// If the shapes do not fit.
pub(super) fn new_product(a: Matrix<'_>, b: Matrix<'_>) -> Vec<f32> {
    let count = a.rows * b.columns;
    if a.columns == 0 {
        return vec![0.0; count];
    }
    assert!(a.columns == b.rows, "{} x {} by {} x {}", a.rows, a.columns, b.rows, b.columns);
    // Large results: filling them with zeros first would be a pass over memory for nothing.
    let mut out: Vec<f32> = Vec::with_capacity(count);
    let target = Pointer { values: out.as_mut_ptr(), row_stride: b.columns, target: Target::Overwrite };
    // SAFETY: the shapes fit, and the buffer has room for all of a.rows x b.columns values, each of which is written and
    // none read.
    #[expect(unsafe_code, reason = "a buffer that a foreign function fills")]
    unsafe {
        multiply(1.0, a, b, target, true);
        out.set_len(count);
    }
    out
}

/// `out ← scale · a · b` or `out ← out + scale · a · b`; with `parallel` on all threads.
///
/// # Panics
/// If the shapes do not fit.
pub(super) fn product(scale: f32, a: Matrix<'_>, b: Matrix<'_>, out: MatrixMut<'_>, target: Target, parallel: bool) {
    assert!(
        a.columns == b.rows && out.rows == a.rows && out.columns == b.columns,
        "{} x {} by {} x {} into {} x {}",
        a.rows,
        a.columns,
        b.rows,
        b.columns,
        out.rows,
        out.columns
    );
    let pointer = Pointer { values: out.values.as_mut_ptr(), row_stride: out.row_stride, target };
    // SAFETY: the shapes fit, the constructor has checked that every element of `out` lies within its slice, and `out` is
    // borrowed mutably, so that nothing that is written overlaps anything that is read.
    #[expect(unsafe_code, reason = "the gemm crate takes pointers")]
    unsafe {
        multiply(scale, a, b, pointer, parallel);
    }
}

/// Where a product goes.
#[derive(Clone, Copy, Debug)]
struct Pointer {
    values: *mut f32,
    row_stride: usize,
    target: Target,
}

/// The product by the `gemm` crate.
///
/// # Safety
/// `a.columns` is `b.rows`; `out` points to a.rows x b.columns values at its stride that nothing else uses; they are
/// initialised if `out.target` reads them.
#[expect(unsafe_code, reason = "the gemm crate takes pointers")]
unsafe fn multiply(scale: f32, a: Matrix<'_>, b: Matrix<'_>, out: Pointer, parallel: bool) {
    let parallelism = if parallel { Parallelism::Rayon(0) } else { Parallelism::None };
    // SAFETY: the constructors of `Matrix` have checked that its elements lie within its slice; the rest is our caller's.
    unsafe {
        gemm::gemm::<f32>(
            a.rows,
            b.columns,
            a.columns,
            out.values,
            1,
            out.row_stride as isize,
            out.target == Target::Add,
            a.values.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_views_are_those_of_the_matrices_they_show() {
        let a: Vec<f32> = (0..12).map(|i| i as f32).collect();
        // Columns 1 and 2 of a 3 x 4 matrix, and the same transposed.
        let view = Matrix::strided(&a[1..], 3, 2, 4);
        let mut out = vec![1.0; 9];
        product(2.0, view, view.transposed(), MatrixMut::dense(&mut out, 3, 3), Target::Add, false);
        let rows = [[1.0, 2.0], [5.0, 6.0], [9.0, 10.0f32]];
        let expected: Vec<f32> =
            rows.iter().flat_map(|r| rows.iter().map(move |c| 1.0 + 2.0 * (r[0] * c[0] + r[1] * c[1]))).collect();
        assert_eq!(out, expected);
        product(1.0, view, view.transposed(), MatrixMut::strided(&mut out, 3, 3, 3), Target::Overwrite, true);
        assert_eq!(out[4], 61.0);
        assert_eq!(new_product(view, view.transposed()), out);
        let none = Matrix::dense(&[], 2, 0);
        assert_eq!(new_product(none, none.transposed()), [0.0; 4]);
    }

    #[test]
    #[should_panic(expected = "outside 11 values")]
    fn a_view_beyond_its_slice_is_refused() {
        Matrix::strided(&[0.0; 11], 3, 4, 4);
    }

    #[test]
    #[should_panic(expected = "2 x 3 by 2 x 3")]
    fn shapes_that_do_not_fit_are_refused() {
        let a = Matrix::dense(&[0.0; 6], 2, 3);
        product(1.0, a, a, MatrixMut::dense(&mut [0.0; 6], 2, 3), Target::Overwrite, false);
    }
}
