//! What the router carries: an IPv4 packet, or several of one flow that the kernel left in one piece.
//!
//! TUN devices with a virtio header hand over up to 64 KiB of one flow as one packet with the size of its segments
//! (segmentation offload, for TCP and for UDP with `UDP_SEGMENT` alike). A [`Unit`] keeps such a packet whole, so that
//! fast links cost few system calls, yet counts its segments as the packets that a wire would carry, and cuts it
//! wherever a rate, a queue or a loss falls between two of them. Nothing is ever summed over the payload: these packets
//! carry only the pseudo header's part of the checksum, which the receiving kernel takes as good.

use std::net::Ipv4Addr;
use std::ops::Range;

use tun_rs::{VIRTIO_NET_HDR_LEN, VirtioNetHdr};

/// Bytes before the IP header.
const VNET: usize = VIRTIO_NET_HDR_LEN;
/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CHECKSUM: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_NONE`.
const NOT_SEGMENTED: u8 = 0;
const TCP: u8 = 6;
const UDP: u8 = 17;
const TCP_FIN_PSH: u8 = 0x01 | 0x08;
const TCP_CWR: u8 = 0x80;

/// One packet, or several of one flow in one piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Virtio header, IP packet.
    bytes: Vec<u8>,
    /// Length of the IP header.
    ip_header: usize,
    /// Length of IP and transport header together; 0 where there is one segment.
    headers: usize,
    /// Payload of each segment but the last; 0 where there is one.
    segment: usize,
}

impl Unit {
    /// Reads what a TUN device delivered: virtio header, IP packet. `None` for what is not sound IPv4.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let vnet = VirtioNetHdr::decode(bytes).ok()?;
        let ip = bytes.get(VNET..)?;
        let first = *ip.first()?;
        let ip_header = usize::from(first & 0x0f) * 4;
        if first >> 4 != 4 || ip_header < 20 || ip.len() < ip_header {
            return None;
        }
        let mut unit = Self { bytes: bytes.to_vec(), ip_header, headers: 0, segment: 0 };
        if vnet.gso_type != NOT_SEGMENTED && vnet.gso_size > 0 {
            let transport = match ip[9] {
                TCP => usize::from(*ip.get(ip_header + 12)? >> 4) * 4,
                UDP => 8,
                _ => return None,
            };
            let headers = ip_header + transport;
            if transport < 8 || ip.len() <= headers {
                return None;
            }
            unit.headers = headers;
            unit.segment = usize::from(vnet.gso_size);
        }
        Some(unit)
    }

    /// Where it goes.
    pub fn destination(&self) -> Ipv4Addr {
        let at = VNET + 16;
        Ipv4Addr::new(self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3])
    }

    /// What a TUN device takes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many packets a wire would carry, at least 1.
    pub fn segments(&self) -> usize {
        if self.segment == 0 { 1 } else { self.payload().div_ceil(self.segment) }
    }

    /// Bytes of these packets from the IP header on.
    pub fn wire_bytes(&self) -> u64 {
        self.wire_bytes_of_first(self.segments())
    }

    /// Bytes of the first `count` packets.
    pub fn wire_bytes_of_first(&self, count: usize) -> u64 {
        if self.segment == 0 {
            return (self.bytes.len() - VNET) as u64;
        }
        (count * self.headers + self.payload().min(count * self.segment)) as u64
    }

    fn payload(&self) -> usize {
        self.bytes.len() - VNET - self.headers
    }

    /// The packets `range` as a unit of their own; the whole where the range holds all of them.
    pub fn part(self, range: Range<usize>) -> Self {
        if range.start == 0 && range.end >= self.segments() { self } else { self.cut_out(range) }
    }

    /// Cuts into units of at most `most` packets.
    pub fn chunks(self, most: usize) -> Vec<Self> {
        let (count, most) = (self.segments(), most.max(1));
        if count <= most {
            return vec![self];
        }
        (0..count).step_by(most).map(|start| self.cut_out(start..(start + most).min(count))).collect()
    }

    /// As the kernel's own segmentation would do it, except that a part may still hold several segments.
    fn cut_out(&self, range: Range<usize>) -> Self {
        let start = range.start * self.segment;
        let end = (range.end * self.segment).min(self.payload());
        let payload = VNET + self.headers;
        let mut bytes = Vec::with_capacity(payload + end - start);
        bytes.extend_from_slice(&self.bytes[..payload]);
        bytes.extend_from_slice(&self.bytes[payload + start..payload + end]);
        let whole = range.end - range.start == 1;
        let mut part = Self {
            bytes,
            ip_header: self.ip_header,
            headers: if whole { 0 } else { self.headers },
            segment: if whole { 0 } else { self.segment },
        };
        part.amend(range.start, start, end == self.payload(), self.headers);
        part
    }

    /// Makes the copied headers true for a part that starts at segment `index`, `offset` bytes into the payload.
    fn amend(&mut self, index: usize, offset: usize, last: bool, headers: usize) {
        let is_whole = self.segment == 0;
        if let Ok(mut vnet) = VirtioNetHdr::decode(&self.bytes) {
            if is_whole {
                (vnet.gso_type, vnet.gso_size) = (NOT_SEGMENTED, 0);
            }
            vnet.hdr_len = headers as u16;
            // The buffer holds a header: one was read from it above.
            let _ = vnet.encode(&mut self.bytes);
        }
        let (flags, checksum_at) = (self.bytes[0], VNET + self.ip_header);
        let ip = &mut self.bytes[VNET..];
        let total = ip.len();
        put16(ip, 2, total as u16);
        let id = get16(ip, 4).wrapping_add(index as u16);
        put16(ip, 4, id);
        put16(ip, 10, 0);
        let sum = !fold(sum(&ip[..self.ip_header], 0));
        put16(ip, 10, sum);
        let (protocol, transport) = (ip[9], total - self.ip_header);
        let pseudo = sum_of_pseudo_header(ip, protocol, transport);
        let l4 = &mut self.bytes[checksum_at..];
        let checksum_offset = if protocol == TCP {
            let sequence = u32::from_be_bytes([l4[4], l4[5], l4[6], l4[7]]).wrapping_add(offset as u32);
            l4[4..8].copy_from_slice(&sequence.to_be_bytes());
            if !last {
                l4[13] &= !TCP_FIN_PSH;
            }
            if index > 0 {
                l4[13] &= !TCP_CWR;
            }
            16
        } else {
            put16(l4, 4, transport as u16);
            6
        };
        if flags & NEEDS_CHECKSUM != 0 {
            put16(l4, checksum_offset, fold(pseudo));
        }
    }
}

fn get16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// One's complement sum of 16-bit words, not folded.
fn sum(bytes: &[u8], start: u32) -> u32 {
    bytes.chunks(2).fold(start, |total, pair| {
        total + (u32::from(pair[0]) << 8) + u32::from(pair.get(1).copied().unwrap_or_default())
    })
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn sum_of_pseudo_header(ip: &[u8], protocol: u8, length: usize) -> u32 {
    sum(&ip[12..20], u32::from(protocol) + length as u32)
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A UDP unit of `count` datagrams of `size` bytes from 10.77.0.1 to 10.77.0.2, counting up in the payload.
    pub(crate) fn udp(count: usize, size: usize) -> Unit {
        let vnet = VirtioNetHdr {
            flags: NEEDS_CHECKSUM,
            gso_type: if count > 1 { 5 } else { NOT_SEGMENTED },
            gso_size: if count > 1 { size as u16 } else { 0 },
            hdr_len: 28,
            csum_start: 20,
            csum_offset: 6,
        };
        let mut bytes = vec![0; VNET + 28];
        vnet.encode(&mut bytes).unwrap();
        bytes[VNET] = 0x45;
        bytes[VNET + 9] = UDP;
        bytes[VNET + 12..VNET + 20].copy_from_slice(&[10, 77, 0, 1, 10, 77, 0, 2]);
        bytes.extend((0..count).flat_map(|i| vec![i as u8; size]));
        Unit::parse(&bytes).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::testing::udp;
    use super::*;

    fn tcp(payload: usize, mss: u16, flags: u8) -> Unit {
        let vnet = VirtioNetHdr {
            flags: NEEDS_CHECKSUM,
            gso_type: 1,
            gso_size: mss,
            hdr_len: 9999,
            csum_start: 20,
            csum_offset: 16,
        };
        let mut bytes = vec![0; VNET + 52];
        vnet.encode(&mut bytes).unwrap();
        bytes[VNET] = 0x45;
        bytes[VNET + 5] = 7;
        bytes[VNET + 9] = TCP;
        bytes[VNET + 12..VNET + 20].copy_from_slice(&[10, 77, 0, 1, 10, 77, 0, 2]);
        bytes[VNET + 24..VNET + 28].copy_from_slice(&u32::MAX.to_be_bytes());
        bytes[VNET + 32] = 8 << 4;
        bytes[VNET + 33] = flags;
        bytes.extend((0..payload).map(|i| i as u8));
        Unit::parse(&bytes).unwrap()
    }

    #[test]
    fn a_piece_counts_as_the_packets_on_the_wire() {
        let unit = tcp(2500, 1000, 0x10);
        assert_eq!((unit.segments(), unit.wire_bytes()), (3, 2500 + 3 * 52));
        assert_eq!((unit.wire_bytes_of_first(1), unit.wire_bytes_of_first(2)), (1052, 2104));
        assert_eq!(unit.destination(), Ipv4Addr::new(10, 77, 0, 2));
        assert_eq!((udp(1, 100).segments(), udp(1, 100).wire_bytes()), (1, 128));
    }

    #[test]
    fn tcp_parts_have_true_headers() {
        let parts = tcp(2500, 1000, 0x80 | 0x18 | 0x01).chunks(2);
        assert_eq!(parts.iter().map(Unit::segments).collect::<Vec<_>>(), [2, 1]);
        let (first, last) = (&parts[0].bytes[VNET..], &parts[1].bytes[VNET..]);
        assert_eq!((first.len(), last.len()), (2052, 552));
        assert_eq!((get16(first, 2), get16(last, 2)), (2052, 552));
        assert_eq!((get16(first, 4), get16(last, 4)), (7, 9));
        assert_eq!(u32::from_be_bytes(last[24..28].try_into().unwrap()), 1999);
        assert_eq!((first[33], last[33]), (0x90, 0x19));
        assert_eq!(last[52], 2000_u32 as u8);
        for ip in [first, last] {
            assert_eq!(fold(sum(&ip[..20], 0)), 0xffff);
        }
        let vnet = VirtioNetHdr::decode(&parts[1].bytes).unwrap();
        assert_eq!((vnet.gso_type, vnet.gso_size, vnet.hdr_len), (0, 0, 52));
        assert_eq!(get16(last, 36), fold(sum_of_pseudo_header(last, TCP, 532)));
    }

    #[test]
    fn udp_parts_keep_their_payload() {
        let part = udp(5, 100).part(3..4);
        assert_eq!((part.segments(), part.wire_bytes()), (1, 128));
        assert_eq!(get16(&part.bytes[VNET..], 24), 108);
        assert!(part.bytes[VNET + 28..].iter().all(|byte| *byte == 3));
        assert_eq!(udp(5, 100).part(0..5), udp(5, 100));
    }

    #[test]
    fn what_is_not_ipv4_is_refused() {
        assert_eq!(Unit::parse(&[0; 5]), None);
        assert_eq!(Unit::parse(&[0; 60]), None);
        let mut six = vec![0; 60];
        six[VNET] = 0x60;
        assert_eq!(Unit::parse(&six), None);
    }
}
