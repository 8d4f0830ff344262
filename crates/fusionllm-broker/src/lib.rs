//! Admits, plans, watches, records, shows
