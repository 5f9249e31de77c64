//! The data of options, parsed without I/O: every length is checked before it is believed.

use super::limits::STRING_BYTES_MAX;

/// Data of INFO and GO.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct InfoRequest<'a> {
    pub(crate) name: &'a str,
    wanted: &'a [u8],
}

impl<'a> InfoRequest<'a> {
    /// `u32 length, name, u16 count, count × u16 kind`.
    pub(crate) fn parse(data: &'a [u8]) -> Option<InfoRequest<'a>> {
        let mut fields = Fields(data);
        let name = fields.string()?;
        let count = fields.u16()?;
        let wanted = fields.bytes(usize::from(count) * 2)?;
        fields.is_empty().then_some(InfoRequest { name, wanted })
    }

    pub(crate) fn wants(&self, kind: u16) -> bool {
        self.wanted.chunks_exact(2).any(|wanted| wanted == kind.to_be_bytes())
    }
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MetaRequest<'a> {
    pub(crate) name: &'a str,
    pub(crate) query_count: u32,
    queries: &'a [u8],
}

impl<'a> MetaRequest<'a> {
    /// `u32 length, name, u32 count, count × (u32 length, query)`.
    pub(crate) fn parse(data: &'a [u8]) -> Option<MetaRequest<'a>> {
        let mut fields = Fields(data);
        let name = fields.string()?;
        let query_count = fields.u32()?;
        let queries = fields.0;
        for _ in 0..query_count {
            fields.string()?;
        }
        fields.is_empty().then_some(MetaRequest { name, query_count, queries })
    }

    pub(crate) fn queries(&self) -> impl Iterator<Item = &'a str> {
        let mut fields = Fields(self.queries);
        std::iter::from_fn(move || fields.string())
    }
}

/// The name that EXPORT_NAME, whose data it is, asks for.
pub(crate) fn export_name(data: &[u8]) -> Option<&str> {
    if data.len() > STRING_BYTES_MAX {
        return None;
    }
    std::str::from_utf8(data).ok()
}

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        let bytes = self.bytes(2)?;
        Some(u16::from_be_bytes(bytes.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        let bytes = self.bytes(4)?;
        Some(u32::from_be_bytes(bytes.try_into().ok()?))
    }

    fn string(&mut self) -> Option<&'a str> {
        let length = self.u32()? as usize;
        if length > STRING_BYTES_MAX {
            return None;
        }
        std::str::from_utf8(self.bytes(length)?).ok()
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_requests_are_exact() {
        let good = b"\0\0\0\x02ab\0\x02\0\x03\0\x01";
        let request = InfoRequest::parse(good).unwrap();
        assert_eq!(request.name, "ab");
        assert!(request.wants(3) && request.wants(1) && !request.wants(2));
        for length in 0..good.len() {
            assert!(InfoRequest::parse(&good[..length]).is_none(), "{length}");
        }
        for wrong in [
            &b"\0\0\0\x02ab\0\x02\0\x03\0\x01\0"[..],
            b"\0\0\0\x02\xff\xfe\0\0",
            b"\xff\xff\xff\xffab\0\0",
        ] {
            assert!(InfoRequest::parse(wrong).is_none(), "{wrong:?}");
        }
    }

    #[test]
    fn meta_requests_are_exact() {
        let good = b"\0\0\0\x01a\0\0\0\x02\0\0\0\x02b:\0\0\0\0";
        let request = MetaRequest::parse(good).unwrap();
        assert_eq!(request.name, "a");
        assert_eq!(request.queries().collect::<Vec<_>>(), ["b:", ""]);
        for length in 0..good.len() {
            assert!(MetaRequest::parse(&good[..length]).is_none(), "{length}");
        }
        assert!(MetaRequest::parse(b"\0\0\0\x01a\xff\xff\xff\xff\0\0\0\x02b:").is_none());
        let mut long = b"\0\0\x10\x01".to_vec();
        long.extend(vec![b'x'; 4097]);
        long.extend([0; 4]);
        assert!(MetaRequest::parse(&long).is_none());
    }
}
