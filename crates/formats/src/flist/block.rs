//! Blocks: pieces of files, compressed and then encrypted with the digest of what they hold, so
//! that the same bytes are the same block for everybody. Named by the digest of what is stored.

use ring::aead;

use super::{BLOCK, Error, bad};

/// How the blocks of an flist are encrypted, and with that how long their names are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cipher {
    /// `.flist`: XXTEA, digests of 16 bytes.
    Xxtea,
    /// `.fl`: AES-256-GCM, digests of 32 bytes.
    AesGcm,
}

/// One block, as an flist refers to it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Block {
    /// The digest of the stored bytes.
    pub id: Box<[u8]>,
    /// The digest of the bytes inside, with which they are encrypted.
    pub key: Box<[u8]>,
}

impl Cipher {
    /// Bytes of a digest.
    pub fn digest_size(self) -> usize {
        match self {
            Cipher::Xxtea => 16,
            Cipher::AesGcm => 32,
        }
    }

    pub fn digest(self, bytes: &[u8]) -> Box<[u8]> {
        let hash = blake2b_simd::Params::new().hash_length(self.digest_size()).hash(bytes);
        hash.as_bytes().into()
    }

    /// What is stored for these bytes, and under which name. Always the same for the same bytes.
    pub fn seal(self, plain: &[u8]) -> (Block, Vec<u8>) {
        let key = self.digest(plain);
        let packed = snap::raw::Encoder::new().compress_vec(plain).expect("shorter than 4 GiB");
        let body = match self {
            Cipher::Xxtea => xxtea_seal(&packed, &key),
            Cipher::AesGcm => {
                let mut body = packed;
                let (key, nonce) = aes(&key);
                key.seal_in_place_append_tag(nonce, aead::Aad::empty(), &mut body)
                    .expect("shorter than what one key may encrypt");
                body
            }
        };
        (Block { id: self.digest(&body), key }, body)
    }

    /// The bytes inside a stored block, which are at most `limit`. Both digests are checked.
    pub fn open(self, block: &Block, body: Vec<u8>, limit: u32) -> Result<Vec<u8>, Error> {
        if self.digest(&body) != block.id {
            return bad("the store answered with other bytes than the block's");
        }
        let packed = match self {
            Cipher::Xxtea => xxtea_open(&body, &block.key)?,
            Cipher::AesGcm => {
                let (key, nonce) = aes(&block.key);
                let mut body = body;
                let length = match key.open_in_place(nonce, aead::Aad::empty(), &mut body) {
                    Ok(plain) => plain.len(),
                    Err(_) => return bad("the block cannot be decrypted with its key"),
                };
                body.truncate(length);
                body
            }
        };
        let plain = unpack(&packed, limit)?;
        match self.digest(&plain) == block.key {
            true => Ok(plain),
            false => bad("the block does not hold what its key says"),
        }
    }

    /// Whether these are the bytes inside a block.
    pub fn holds(self, block: &Block, plain: &[u8]) -> bool {
        self.digest(plain) == block.key
    }
}

fn unpack(packed: &[u8], limit: u32) -> Result<Vec<u8>, Error> {
    let wrong = |e: snap::Error| Error::Bad(format!("the block cannot be unpacked: {e}"));
    let length = snap::raw::decompress_len(packed).map_err(wrong)?;
    if length > limit.max(BLOCK) as usize {
        return bad(format!("a block of {length} bytes where at most {limit} belong"));
    }
    snap::raw::Decoder::new().decompress_vec(packed).map_err(wrong)
}

fn aes(key: &[u8]) -> (aead::LessSafeKey, aead::Nonce) {
    let unbound = aead::UnboundKey::new(&aead::AES_256_GCM, key).expect("32 bytes");
    let nonce = aead::Nonce::try_assume_unique_for_key(&key[..12]).expect("12 bytes");
    (aead::LessSafeKey::new(unbound), nonce)
}

const DELTA: u32 = 0x9e37_79b9;

fn words(bytes: &[u8]) -> Vec<u32> {
    let word = |chunk: &[u8]| {
        let mut four = [0; 4];
        four[..chunk.len()].copy_from_slice(chunk);
        u32::from_le_bytes(four)
    };
    bytes.chunks(4).map(word).collect()
}

fn rounds(words: usize) -> u32 {
    6 + 52 / words as u32
}

fn mix(sum: u32, y: u32, z: u32, p: usize, key: &[u32], e: usize) -> u32 {
    (((z >> 5) ^ (y << 2)).wrapping_add((y >> 3) ^ (z << 4)))
        ^ ((sum ^ y).wrapping_add(key[(p & 3) ^ e] ^ z))
}

/// The bytes as words, their length behind them, mixed with the key.
fn xxtea_seal(plain: &[u8], key: &[u8]) -> Vec<u8> {
    let key = words(key);
    let mut v = words(plain);
    v.push(plain.len() as u32);
    let n = v.len();
    if n > 1 {
        let (mut sum, mut z) = (0u32, v[n - 1]);
        for _ in 0..rounds(n) {
            sum = sum.wrapping_add(DELTA);
            let e = (sum >> 2) as usize & 3;
            for p in 0..n {
                let y = v[(p + 1) % n];
                v[p] = v[p].wrapping_add(mix(sum, y, z, p, &key, e));
                z = v[p];
            }
        }
    }
    v.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn xxtea_open(body: &[u8], key: &[u8]) -> Result<Vec<u8>, Error> {
    if body.len() < 8 || !body.len().is_multiple_of(4) {
        return bad(format!("a stored block of {} bytes is impossible", body.len()));
    }
    let key = words(key);
    let mut v = words(body);
    let n = v.len();
    let mut sum = rounds(n).wrapping_mul(DELTA);
    let mut y = v[0];
    while sum != 0 {
        let e = (sum >> 2) as usize & 3;
        for p in (0..n).rev() {
            let z = v[(p + n - 1) % n];
            v[p] = v[p].wrapping_sub(mix(sum, y, z, p, &key, e));
            y = v[p];
        }
        sum = sum.wrapping_sub(DELTA);
    }
    let length = v[n - 1] as usize;
    let most = 4 * (n - 1);
    if length > most || length + 3 < most {
        return bad("the block cannot be decrypted with its key");
    }
    let mut plain: Vec<u8> = v[..n - 1].iter().flat_map(|word| word.to_le_bytes()).collect();
    plain.truncate(length);
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &[u8] = b"kernel: /boot/vmlinuz\ninitrd: /boot/initrd.img\n";

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn blocks_are_those_that_other_writers_make() {
        let (block, body) = Cipher::Xxtea.seal(PLAIN);
        assert_eq!(hex(&block.key), "9572f03b9579bb6e8fe471064b7d5da0");
        assert_eq!(hex(&block.id), "9785bfecf80259b9e436bdf5519f9364");
        assert_eq!(
            hex(&body),
            "6b83724efaf78953c33eccfff62943866f460b37b8e03431ee0777879c20eed271d3f641074ba983d658\
             48f7b17288cd"
        );
        let (block, body) = Cipher::AesGcm.seal(PLAIN);
        assert_eq!(
            hex(&block.key),
            "04b08409c6e34e1ad296c3d907b4efcf610d59e60c60c1ab2f49c82ae7915b41"
        );
        assert_eq!(
            hex(&block.id),
            "0c8fa9adf0594e316ab1a987a827472dd0cce58d1b01ac3465b79b35f40356fd"
        );
        assert_eq!(
            hex(&body),
            "31e3a9f60b84aa1c9b404626784b1c75c6751defe9c83d9d14ea71511cd3d3c99193a8552e2e7ad5fd4b\
             4c3c8d976ab17403874f454d9222174c680f"
        );
    }

    #[test]
    fn what_was_sealed_opens_and_a_flipped_bit_does_not() {
        for cipher in [Cipher::Xxtea, Cipher::AesGcm] {
            for length in [0, 1, 3, 4, 5, 4096, BLOCK as usize] {
                let plain: Vec<u8> = (0..length).map(|i| (i * 7 + i / 251) as u8).collect();
                let (block, body) = cipher.seal(&plain);
                assert_eq!(cipher.open(&block, body.clone(), BLOCK).unwrap(), plain);
                let mut other = body.clone();
                let middle = other.len() / 2;
                other[middle] ^= 1;
                assert!(cipher.open(&block, other.clone(), BLOCK).is_err());
                // The name is right, and still what is inside is wrong.
                let named = Block { id: cipher.digest(&other), key: block.key.clone() };
                assert!(cipher.open(&named, other, BLOCK).is_err());
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn foreign_bodies_are_answered(body: Vec<u8>, key: [u8; 32]) {
            for cipher in [Cipher::Xxtea, Cipher::AesGcm] {
                let key = key[..cipher.digest_size()].into();
                let block = Block { id: cipher.digest(&body), key };
                proptest::prop_assert!(cipher.open(&block, body.clone(), BLOCK).is_err());
            }
        }
    }
}
