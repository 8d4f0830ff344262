//! A gradient of which only some rows differ from zero.

use std::collections::BTreeMap;
use std::ops::Range;

/// Rows of a table's gradient by number; all others are zero.
#[derive(Clone, Debug, Default)]
pub(super) struct RowSum {
    columns: usize,
    /// Where a row begins in `values`.
    starts: BTreeMap<u32, usize>,
    values: Vec<f32>,
}

impl RowSum {
    /// The gradient of a lookup of `ids` from that of its output, a row for each id. The rows of one id are added in
    /// their order, to zero, as in a table of zeros.
    pub(super) fn of(ids: &[i32], gradient: &[f32]) -> Self {
        let columns = gradient.len() / ids.len().max(1);
        let mut sum = Self { columns, ..Self::default() };
        for (&id, gradient) in ids.iter().zip(gradient.chunks_exact(columns.max(1))) {
            // FP has looked it up, so it is none below zero.
            if let Ok(row) = u32::try_from(id) {
                sum.add_row(row, gradient);
            }
        }
        sum
    }

    /// These rows, ascending, with their values one after the other.
    pub(super) fn of_rows(rows: &[u32], values: Vec<f32>) -> Self {
        let columns = values.len() / rows.len().max(1);
        let starts = rows.iter().enumerate().map(|(index, &row)| (row, index * columns)).collect();
        Self { columns, starts, values }
    }

    /// Adds those of another micro-batch.
    pub(super) fn add(&mut self, term: Self) {
        if self.columns == 0 {
            *self = term;
            return;
        }
        for (row, values) in term.iter() {
            self.add_row(row, values);
        }
    }

    fn add_row(&mut self, row: u32, term: &[f32]) {
        let (values, columns) = (&mut self.values, self.columns);
        let start = *self.starts.entry(row).or_insert_with(|| {
            let start = values.len();
            values.resize(start + columns, 0.0);
            start
        });
        values[start..start + columns].iter_mut().zip(term).for_each(|(sum, term)| *sum += term);
    }

    fn iter(&self) -> impl Iterator<Item = (u32, &[f32])> {
        self.starts.iter().map(|(&row, &start)| (row, &self.values[start..start + self.columns]))
    }

    /// Adds the rows to those of the whole table; a row beyond it is left out.
    pub(super) fn add_into(&self, table: &mut [f32]) {
        for (row, values) in self.iter() {
            let start = row as usize * self.columns;
            if let Some(into) = table.get_mut(start..start + self.columns) {
                into.iter_mut().zip(values).for_each(|(sum, term)| *sum += term);
            }
        }
    }

    /// Elements `range` of the whole table's gradient.
    pub(super) fn range(&self, range: Range<usize>) -> Vec<f32> {
        let mut part = vec![0.0; range.len()];
        if range.is_empty() || self.columns == 0 {
            return part;
        }
        let first = u32::try_from(range.start / self.columns).unwrap_or(u32::MAX);
        let last = u32::try_from((range.end - 1) / self.columns).unwrap_or(u32::MAX);
        for (&row, &start) in self.starts.range(first..=last) {
            let of_row = row as usize * self.columns;
            let (from, to) = (of_row.max(range.start), (of_row + self.columns).min(range.end));
            part[from - range.start..to - range.start]
                .copy_from_slice(&self.values[start + from - of_row..start + to - of_row]);
        }
        part
    }
}
