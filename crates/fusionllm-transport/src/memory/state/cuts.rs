//! How connections break.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::RngExt;

use super::{Event, State};
use crate::memory::link::{Side, StreamId};
use crate::memory::packets::Packet;

/// A connection that breaks at a byte has fewer than two to this power.
const FUSE_BITS: u32 = 12;

impl State {
    /// Whether and when a new connection breaks: at a time, or at a byte.
    pub(super) fn draw_fate(&mut self, link: usize) {
        if !self.dice.random_bool(self.weather.breaking.clamp(0.0, 1.0)) {
            return;
        }
        if self.dice.random_bool(0.5) {
            let bits = self.dice.random_range(0..FUSE_BITS);
            let fuse = self.dice.random_range(1..=1u64 << bits);
            if let Some(link) = self.links.get_mut(&link) {
                link.fuse = Some(fuse);
            }
            return;
        }
        let Self { weather, dice, .. } = self;
        let lifetime = weather.lifetime.start.as_secs_f64()..=weather.lifetime.end.as_secs_f64();
        let lasts = Duration::from_secs_f64(dice.random_range(lifetime));
        self.schedule(lasts, Event::Cut { link });
    }

    /// A connection breaks, in one of three ways: nothing gets through either way, or only one way, or one side ends it
    /// without a word.
    pub(super) fn cut(&mut self, link: usize) {
        let is_stormy = self.is_stormy();
        let Some(link_state) = self.links.get_mut(&link) else { return };
        link_state.fuse = None;
        if !is_stormy || link_state.is_dead != [false; 2] {
            return;
        }
        let places = [link_state.ends[0].place, link_state.ends[1].place];
        let idle = self.weather.idle;
        let one: Side = self.dice.random_range(0..2);
        let other = 1 - one;
        let (dead, notices): (&[Side], _) = match self.dice.random_range(0..3) {
            0 => (&[0, 1], [(one, self.up_to(idle)), (other, self.up_to(idle))]),
            1 => {
                // Who sends into nothing hears the other until that gives up.
                let first = idle / 2 + self.up_to(idle / 2);
                let second = first + self.up_to(idle);
                (if one == 0 { &[0] } else { &[1] }, [(other, first), (one, second)])
            }
            _ => (&[0, 1], [(one, Duration::ZERO), (other, self.up_to(idle))]),
        };
        self.note(&format_args!("#{link} breaks from {dead:?}"));
        for &from in dead {
            self.lose_part(link, from);
        }
        for (side, after) in notices {
            self.schedule(after, Event::Notice { link, side });
        }
        let until = self.now + self.up_to(self.weather.outage);
        let pair = (places[0].min(places[1]), places[0].max(places[1]));
        let outage = self.outages.entry(pair).or_default();
        *outage = until.max(*outage);
    }

    /// Nothing more gets through from a side, and of what is on its way each stream loses its own part.
    pub(super) fn lose_part(&mut self, link: usize, from: Side) {
        if let Some(link) = self.links.get_mut(&link) {
            link.is_dead[from] = true;
        }
        let keys = self.on_the_way(link, 1 - from);
        let mut coming: BTreeMap<StreamId, usize> = BTreeMap::new();
        for key in &keys {
            if let Some(Packet::Data { stream, bytes }) = self.packet_mut(*key) {
                *coming.entry(*stream).or_default() += bytes.len();
            }
        }
        let mut through: BTreeMap<StreamId, usize> = BTreeMap::new();
        for (stream, bytes) in coming {
            through.insert(stream, self.dice.random_range(0..=bytes));
        }
        for key in keys {
            let comes_anyway = self.dice.random_bool(0.5);
            let comes = match self.packet_mut(key) {
                Some(Packet::Data { stream, bytes }) => {
                    let left = through.entry(*stream).or_default();
                    bytes.truncate(*left);
                    *left -= bytes.len();
                    !bytes.is_empty()
                }
                // Bytes before it may be lost.
                Some(Packet::End { stream }) => !through.contains_key(stream) && comes_anyway,
                Some(_) => comes_anyway,
                None => continue,
            };
            if !comes {
                self.lose(key);
            }
        }
    }
}
