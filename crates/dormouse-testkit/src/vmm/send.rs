//! The handshake as Firecracker's versions send it, and as none of them does.

use std::fs::File;
use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result};
use dormouse_sys::userfaultfd::Userfaultfd;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use super::config::{Lie, Manner, Version};
use super::protocol::RegionAddress;

/// Hands memory over. The socket, where this version keeps it open.
pub(super) fn hand_over(
    socket: &Path,
    version: Version,
    manner: Manner,
    regions: &[RegionAddress],
    uffd: &Userfaultfd,
) -> Result<Option<UnixStream>> {
    let stream = UnixStream::connect(socket)
        .with_context(|| format!("nobody listens at {}", socket.display()))?;
    let regions = match manner {
        Manner::Lie(lie) => told(lie, regions),
        _ => regions.to_vec(),
    };
    let table = serde_json::to_vec(&table(version, &regions))?;
    let null = File::open("/dev/null")?;
    let (uffd, null) = (uffd.as_fd(), null.as_fd());
    match manner {
        Manner::AtOnce => send(&stream, &table, &[uffd])?,
        Manner::AmongOthers => send(&stream, &table, &[null, uffd, null])?,
        Manner::TableFirst => {
            let (last, rest) = table.split_last().context("a table is not empty")?;
            send(&stream, rest, &[])?;
            send(&stream, &[*last], &[uffd])?;
        }
        Manner::InPieces => {
            for (number, piece) in table.chunks(17).enumerate() {
                let descriptors = [uffd];
                send(&stream, piece, &descriptors[..usize::from(number == 0)])?;
            }
        }
        Manner::Lie(Lie::NoDescriptor) => send(&stream, &table, &[])?,
        Manner::Lie(Lie::WrongDescriptor) => send(&stream, &table, &[null])?,
        Manner::Lie(Lie::CutShort) => {
            send(&stream, &table[..table.len() / 2], &[uffd])?;
            return Ok(None);
        }
        Manner::Lie(Lie::Silence) => return Ok(Some(stream)),
        Manner::Lie(Lie::NoTable) => send(&stream, b"{\"base_host_virt_addr\":0}", &[uffd])?,
        Manner::Lie(_) => send(&stream, &table, &[uffd])?,
    }
    Ok((version == Version::V1_12).then_some(stream))
}

fn table(version: Version, regions: &[RegionAddress]) -> Value {
    let row = |region: &RegionAddress| {
        let mut row = json!({
            "base_host_virt_addr": region.address,
            "size": region.size,
            "offset": region.offset,
        });
        if version != Version::V1_1 {
            row["page_size_kib"] = json!(region.page_bytes);
        }
        if version == Version::V1_12 {
            row["page_size"] = json!(region.page_bytes);
        }
        row
    };
    regions.iter().map(row).collect()
}

/// The regions as a liar tells them.
fn told(lie: Lie, regions: &[RegionAddress]) -> Vec<RegionAddress> {
    let mut told = regions.to_vec();
    let last = told.len() - 1;
    match lie {
        Lie::BeyondImage => told[last].size *= 2,
        Lie::MissingRegion => told.truncate(last),
        Lie::Overlap => {
            let first = told[0].address;
            told.iter_mut().for_each(|region| region.address = first);
        }
        Lie::Misaligned => told.iter_mut().for_each(|region| region.address += 512),
        // Far below where the kernel puts maps.
        Lie::Elsewhere => {
            told.iter_mut().for_each(|region| region.address = region.offset + (1 << 40));
        }
        Lie::NoDescriptor | Lie::WrongDescriptor | Lie::CutShort | Lie::Silence | Lie::NoTable => {}
    }
    told
}

fn send(mut stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)), "room for four");
    }
    let sent = sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
        .context("cannot send a handshake")?;
    stream.write_all(&bytes[sent..]).context("cannot send a handshake")
}
