//! Firecracker's table: one JSON array with an object per region, ascending by guest address.
//!
//! ```json
//! [{"base_host_virt_addr":140318643617792,"size":3221225472,"offset":0,
//!   "page_size":4096,"page_size_kib":4096}]
//! ```
//!
//! | versions | page size | socket |
//! |---|---|---|
//! | 1.1 to 1.6 | not told: 4 KiB | closed after sending |
//! | 1.7 to 1.11 | `page_size_kib`, in bytes whatever its name | closed after sending |
//! | 1.12 and later | `page_size` in bytes, and the former | open as long as the process |
//!
//! Source: `GuestRegionUffdMapping` in Firecracker's `src/vmm/src/persist.rs`.

use serde::Deserialize;

use super::{MESSAGE_BYTES_MAX, REGIONS_MAX, Region, SocketEnd, Table};
use crate::error::{Error, ErrorKind, Result};

/// The page size of versions that tell none.
const PAGE_BYTES: u64 = 4096;

#[derive(Deserialize)]
struct Row {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    page_size_kib: Option<u64>,
}

/// Reads a table; none if it is not whole yet. Keys it does not know are passed over.
///
/// [`ErrorKind::Protocol`] for what can become no table, whatever follows: other JSON, more than
/// [`REGIONS_MAX`] regions or [`MESSAGE_BYTES_MAX`] bytes, anything behind the array.
pub fn parse(bytes: &[u8]) -> Result<Option<Table>> {
    if bytes.len() > MESSAGE_BYTES_MAX {
        let message = format!("a memory table of {} bytes", bytes.len());
        return Err(Error::protocol(format!("{message}; expected {MESSAGE_BYTES_MAX} at most")));
    }
    let mut stream = serde_json::Deserializer::from_slice(bytes).into_iter::<Vec<Row>>();
    let rows = match stream.next() {
        None => return Ok(None),
        Some(Err(error)) if error.is_eof() => return Ok(None),
        Some(Err(error)) => {
            return Err(Error::with_source(ErrorKind::Protocol, "not a memory table", error));
        }
        Some(Ok(rows)) => rows,
    };
    let end = stream.byte_offset();
    if !bytes[end..].iter().all(u8::is_ascii_whitespace) {
        let message = format!("{} bytes behind a memory table", bytes.len() - end);
        return Err(Error::protocol(message));
    }
    if rows.is_empty() || rows.len() > REGIONS_MAX {
        let message = format!("a memory table of {} regions", rows.len());
        return Err(Error::protocol(format!("{message}; expected 1 to {REGIONS_MAX}")));
    }
    let stays_open = rows.iter().all(|row| row.page_size.is_some());
    let regions = rows.iter().map(|row| Region {
        address: row.base_host_virt_addr,
        size: row.size,
        offset: row.offset,
        page_bytes: row.page_size.or(row.page_size_kib).unwrap_or(PAGE_BYTES),
    });
    Ok(Some(Table {
        regions: regions.collect(),
        socket_end: if stays_open { SocketEnd::VmGone } else { SocketEnd::Nothing },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Firecracker 1.12 sends for 4 GiB.
    const TWO: &str = r#"[
        {"base_host_virt_addr":140318643617792,"size":3221225472,"offset":0,
         "page_size":4096,"page_size_kib":4096},
        {"base_host_virt_addr":140314348650496,"size":1073741824,"offset":3221225472,
         "page_size":4096,"page_size_kib":4096}]"#;

    fn one(rest: &str) -> String {
        format!(r#"[{{"base_host_virt_addr":65536,"size":8192,"offset":0{rest}}}]"#)
    }

    #[test]
    fn every_version_is_understood() {
        let cases = [
            ("", 4096, SocketEnd::Nothing),
            (r#","page_size_kib":4096"#, 4096, SocketEnd::Nothing),
            (r#","page_size_kib":2097152"#, 2 << 20, SocketEnd::Nothing),
            (r#","page_size":2097152"#, 2 << 20, SocketEnd::VmGone),
            (r#","page_size":4096,"page_size_kib":4096"#, 4096, SocketEnd::VmGone),
            // Should a later version correct the value, the name that is right counts.
            (r#","page_size":4096,"page_size_kib":4"#, 4096, SocketEnd::VmGone),
            (r#","page_size":null"#, 4096, SocketEnd::Nothing),
            (r#","gpa_start":0,"is_guest_memfd":true,"x":{"y":[1]}"#, 4096, SocketEnd::Nothing),
        ];
        for (rest, page_bytes, socket_end) in cases {
            let table = parse(one(rest).as_bytes()).unwrap().unwrap();
            let region = Region { address: 65536, size: 8192, offset: 0, page_bytes };
            assert_eq!(table, Table { regions: vec![region], socket_end }, "{rest}");
        }
    }

    #[test]
    fn a_table_is_whole_at_its_last_byte_and_no_sooner() {
        for len in 0..TWO.len() {
            assert_eq!(parse(&TWO.as_bytes()[..len]).unwrap(), None, "{len} bytes");
        }
        let table = parse(TWO.as_bytes()).unwrap().unwrap();
        assert_eq!(table.regions.len(), 2);
        assert_eq!(table.regions[1].address, 140_314_348_650_496);
        assert_eq!(table.regions[1].offset, 3 << 30);
        let spaced = format!("{TWO} \n");
        assert_eq!(parse(spaced.as_bytes()).unwrap(), Some(table));
    }

    #[test]
    fn what_can_become_no_table_is_refused_at_once() {
        let many = format!("[{}]", vec![&one("")[1..one("").len() - 1]; REGIONS_MAX + 1].join(","));
        let long = " ".repeat(MESSAGE_BYTES_MAX + 1);
        let deep = format!(r#"[{{"x":{}"#, "[".repeat(100_000));
        let cases: &[&[u8]] = &[
            b"{",
            b"null",
            b"[]",
            b"[1",
            b"GET / HTTP/1.1",
            b"[{}",
            br#"[{"base_host_virt_addr":-1"#,
            br#"[{"base_host_virt_addr":1.5,"#,
            br#"[{"base_host_virt_addr":18446744073709551616,"#,
            br#"[{"size":1,"size":1"#,
            br#"[{"size":"1""#,
            &[one(""), "[".to_owned()].concat().into_bytes(),
            &[one(""), one("")].concat().into_bytes(),
            many.as_bytes(),
            long.as_bytes(),
        ];
        for case in cases {
            let shown = String::from_utf8_lossy(&case[..case.len().min(60)]).into_owned();
            let error = parse(case).expect_err(&shown);
            assert_eq!(error.kind(), ErrorKind::Protocol, "{shown}");
        }
        // As deep as it likes: nothing is built of what is passed over.
        assert!(parse(deep.as_bytes()).map_or_else(|_| true, |table| table.is_none()));
    }
}
