//! A network: nodes, the links between them, and what happens to them over time.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use crate::error::Error;
use crate::fabric::Access;
use crate::link::{Link, LinkRule};

mod file;

pub use file::{Command, Kill, NetworkFile, NodeEntry, Step};

/// Most nodes of one network.
pub const MOST_NODES: usize = 24;

/// One node.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// The name it was listed under, which differs where `count` made several of it.
    pub group: String,
    /// Where it stands; may be empty.
    pub site: String,
    /// Its address within the network.
    pub address: Ipv4Addr,
    /// Its access to the network.
    pub access: Access,
    /// What `wan-emu run` starts on it.
    pub run: Option<String>,
}

/// A network as described.
#[derive(Debug, Clone, PartialEq)]
pub struct Network {
    /// Its name: part of the names of its namespaces.
    pub name: String,
    /// Settles all chance.
    pub seed: u64,
    /// Largest IP packet.
    pub mtu: u16,
    /// The nodes.
    pub nodes: Vec<Node>,
    /// A link for each directed pair, row by row.
    pub links: Vec<Link>,
    /// What happens, in order of time.
    pub steps: Vec<Step>,
    /// When `wan-emu run` ends by itself.
    pub duration: Option<Duration>,
}

impl Network {
    /// Reads a file; the network is named after `name`, else as the file says, else as the file is called.
    ///
    /// # Errors
    /// [`Error::Input`], [`Error::Parse`].
    pub fn read(path: &Path, name: Option<&str>) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::input(format!("cannot read {}: {error}", path.display())))?;
        let file: NetworkFile =
            toml::from_str(&text).map_err(|error| Error::Parse { path: path.to_owned(), source: Box::new(error) })?;
        let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let name = name.map_or_else(|| if file.name.is_empty() { stem } else { file.name.clone() }, str::to_owned);
        file.resolve(&slug(&name))
    }

    /// The node of that name.
    ///
    /// # Errors
    /// [`Error::Input`] that lists the names there are.
    pub fn node(&self, name: &str) -> Result<usize, Error> {
        self.nodes.iter().position(|node| node.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.nodes.iter().map(|node| node.name.as_str()).collect();
            Error::input(format!("no node is named `{name}`; there are {}", names.join(", ")))
        })
    }

    /// The link from `from` to `to`.
    pub fn link(&self, from: usize, to: usize) -> &Link {
        &self.links[from * self.nodes.len() + to]
    }

    /// How a rule fits a directed pair: forwards (`false`), backwards (`true`) or not.
    pub fn fits(&self, rule: &LinkRule, from: usize, to: usize) -> Option<bool> {
        let there = self.is_named(&rule.from, from) && self.is_named(&rule.to, to);
        let back = !rule.one_way && self.is_named(&rule.from, to) && self.is_named(&rule.to, from);
        if there { Some(false) } else { back.then_some(true) }
    }

    /// Changes the links that a rule fits, all or none, and returns which.
    ///
    /// # Errors
    /// [`Error::Input`] where it fits none, and as [`LinkRule::apply`].
    pub fn change(&mut self, rule: &LinkRule) -> Result<Vec<(usize, usize)>, Error> {
        self.check_ends(rule)?;
        let mut links = self.links.clone();
        let mut changed = Vec::new();
        for (from, to) in pairs(self.nodes.len()) {
            if let Some(back) = self.fits(rule, from, to) {
                rule.apply(&mut links[from * self.nodes.len() + to], back)?;
                changed.push((from, to));
            }
        }
        if changed.is_empty() {
            return Err(Error::input(format!("no link goes from `{}` to `{}`", rule.from, rule.to)));
        }
        self.links = links;
        Ok(changed)
    }

    fn is_named(&self, end: &str, node: usize) -> bool {
        let node = &self.nodes[node];
        end == "*" || end == node.name || end == node.group || (!node.site.is_empty() && end == node.site)
    }

    fn check_ends(&self, rule: &LinkRule) -> Result<(), Error> {
        for end in [&rule.from, &rule.to] {
            if !(0..self.nodes.len()).any(|node| self.is_named(end, node)) {
                return Err(Error::input(format!("a link names `{end}`, which is neither a node nor a site")));
            }
        }
        Ok(())
    }
}

/// All directed pairs of different nodes.
pub fn pairs(nodes: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..nodes).flat_map(move |from| (0..nodes).map(move |to| (from, to))).filter(|(from, to)| from != to)
}

/// A name that may be part of a namespace's: anything else than letters, digits, `-` and `_` becomes `-`.
fn slug(name: &str) -> String {
    let good = |c: char| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '-' };
    let slug: String = name.chars().map(good).take(40).collect();
    slug.trim_matches('-').to_owned()
}

#[cfg(test)]
mod tests;
