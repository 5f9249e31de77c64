//! The checksum of ext4's metadata: CRC-32C (Castagnoli), reflected, without the final inversion,
//! so that a sum over two pieces is the sum of the second begun with that of the first.

/// What a sum begins with that is not continued from another one.
pub(crate) const START: u32 = !0;

const POLYNOMIAL: u32 = 0x82f6_3b78;

/// `TABLES[k][b]`: what byte `b` adds when `k` more bytes follow in the same step of eight.
static TABLES: [[u32; 256]; 8] = tables();

#[expect(clippy::cast_possible_truncation, reason = "a byte's values fit into 32 bits")]
const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut sum = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            sum = if sum & 1 == 1 { (sum >> 1) ^ POLYNOMIAL } else { sum >> 1 };
            bit += 1;
        }
        tables[0][byte] = sum;
        byte += 1;
    }
    let mut step = 1;
    while step < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before: u32 = tables[step - 1][byte];
            tables[step][byte] = (before >> 8) ^ tables[0][(before & 0xff) as usize];
            byte += 1;
        }
        step += 1;
    }
    tables
}

/// The sum over `bytes`, begun with `sum`.
pub(crate) fn crc32c(mut sum: u32, bytes: &[u8]) -> u32 {
    let (eights, rest) = bytes.as_chunks::<8>();
    for eight in eights {
        let head = u32::from_le_bytes([eight[0], eight[1], eight[2], eight[3]]) ^ sum;
        let head = head.to_le_bytes();
        sum = TABLES[7][usize::from(head[0])]
            ^ TABLES[6][usize::from(head[1])]
            ^ TABLES[5][usize::from(head[2])]
            ^ TABLES[4][usize::from(head[3])]
            ^ TABLES[3][usize::from(eight[4])]
            ^ TABLES[2][usize::from(eight[5])]
            ^ TABLES[1][usize::from(eight[6])]
            ^ TABLES[0][usize::from(eight[7])];
    }
    for &byte in rest {
        let low = sum.to_le_bytes()[0] ^ byte;
        sum = (sum >> 8) ^ TABLES[0][usize::from(low)];
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_value_of_the_catalogue() {
        assert_eq!(!crc32c(START, b"123456789"), 0xe306_9283);
        let long: Vec<u8> = (0..=255).collect();
        for cut in [0, 1, 7, 8, 100, 256] {
            let (head, tail) = long.split_at(cut);
            assert_eq!(crc32c(crc32c(START, head), tail), crc32c(START, &long));
        }
    }
}
