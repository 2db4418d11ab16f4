//! What the next server of a mount must know, as bytes that lie in custody beside its device.
//!
//! ```text
//! 1 byte   version of this format: 1
//! 2 bytes  length of the INIT request, little-endian
//!          the INIT request, as the kernel sent it
//!          our reply to it, header included, as the kernel got it
//! ```
//!
//! Layouts of the two are those of `linux/fuse.h`; all their numbers are in native byte order.

/// First byte of the format written here.
const VERSION: u8 = 1;

/// `fuse_in_header`.
const IN_HEADER: usize = 40;
/// `fuse_out_header`.
const OUT_HEADER: usize = 16;
/// Opcode `FUSE_INIT`.
const INIT: u32 = 26;
/// The major version of the protocol that every Linux speaks.
const MAJOR: u32 = 7;
/// `FUSE_INIT_EXT`: the second 32 flags count.
const INIT_EXT: u64 = 1 << 30;
/// `FUSE_HAS_RESEND`: the kernel repeats what it had asked a server that died (Linux 6.9).
const HAS_RESEND: u64 = 1 << 39;

/// The handshake of a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Context {
    init: Vec<u8>,
    reply: Vec<u8>,
}

/// Why bytes are no handshake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ContextError {
    /// Written by a version of this program that knows more.
    #[error("its format is version {0}; version {VERSION} is understood")]
    Version(u8),
    /// Not what its own lengths say, or not what the protocol says.
    #[error("{0}")]
    Malformed(&'static str),
}

impl Context {
    /// The handshake of this request and this reply.
    pub(super) fn new(init: &[u8], reply: &[u8]) -> Result<Self, ContextError> {
        let context = Self {
            init: init.to_vec(),
            reply: reply.to_vec(),
        };
        let request = |what| Err(ContextError::Malformed(what));
        if u32_at(init, 0).map(|length| length as usize) != Some(init.len()) {
            return request("the INIT request is not as long as it says");
        }
        if u32_at(init, 4) != Some(INIT) || u32_at(init, IN_HEADER) != Some(MAJOR) {
            return request("the INIT request is no INIT request of FUSE 7");
        }
        if u32_at(reply, 0).map(|length| length as usize) != Some(reply.len()) {
            return request("the reply to INIT is not as long as it says");
        }
        if u32_at(reply, 4) != Some(0) || u32_at(reply, OUT_HEADER) != Some(MAJOR) {
            return request("the reply to INIT refuses the mount");
        }
        Ok(context)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, ContextError> {
        let truncated = ContextError::Malformed("it ends too early");
        match bytes {
            [VERSION, low, high, rest @ ..] => {
                let length = u16::from_le_bytes([*low, *high]);
                let (init, reply) = rest.split_at_checked(length.into()).ok_or(truncated)?;
                Self::new(init, reply)
            }
            [VERSION, ..] | [] => Err(truncated),
            [version, ..] => Err(ContextError::Version(*version)),
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        // The kernel's request has 104 bytes; a read of it cannot yield 64 KiB.
        let length = u16::try_from(self.init.len()).unwrap_or(u16::MAX);
        let mut bytes = vec![VERSION];
        bytes.extend(length.to_le_bytes());
        bytes.extend(&self.init);
        bytes.extend(&self.reply);
        bytes
    }

    /// The INIT request.
    pub(super) fn init(&self) -> &[u8] {
        &self.init
    }

    /// Whether the kernel repeats to a new server what it had asked the dead one.
    pub(super) fn can_resend(&self) -> bool {
        // fuse_init_in: major, minor, max_readahead, flags, flags2
        flags(&self.init, IN_HEADER + 12, IN_HEADER + 16) & HAS_RESEND != 0
    }

    /// Whether a server that would have given `reply` can serve this mount: the kernel goes on
    /// speaking the minor version and using the features it was promised at the first time.
    pub(super) fn agrees_with(&self, reply: &[u8]) -> bool {
        // fuse_init_out: major, minor, max_readahead, flags, 4 times 16 and twice 32 bits, flags2
        let promised = |reply: &[u8]| flags(reply, OUT_HEADER + 12, OUT_HEADER + 32);
        let minor = |reply: &[u8]| u32_at(reply, OUT_HEADER + 4);
        minor(&self.reply) == minor(reply) && promised(&self.reply) & !promised(reply) == 0
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(u32::from_ne_bytes(four))
}

/// 64 flags in two halves, the upper one where the lower one says so.
fn flags(bytes: &[u8], lower: usize, upper: usize) -> u64 {
    let lower = u64::from(u32_at(bytes, lower).unwrap_or(0));
    match lower & INIT_EXT != 0 {
        true => lower | u64::from(u32_at(bytes, upper).unwrap_or(0)) << 32,
        false => lower,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(header: usize, words: &[u32]) -> Vec<u8> {
        let mut bytes = vec![0; header];
        bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        let length = u32::try_from(bytes.len()).unwrap();
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        bytes
    }

    fn request(flags: u64) -> Vec<u8> {
        let (lower, upper) = (flags as u32, (flags >> 32) as u32);
        let mut bytes = message(IN_HEADER, &[7, 45, 0x20000, lower, upper]);
        bytes.resize(104, 0);
        bytes[..4].copy_from_slice(&104_u32.to_ne_bytes());
        bytes[4..8].copy_from_slice(&INIT.to_ne_bytes());
        bytes
    }

    fn reply(minor: u32, flags: u64) -> Vec<u8> {
        let (lower, upper) = (flags as u32, (flags >> 32) as u32);
        message(
            OUT_HEADER,
            &[7, minor, 0x20000, lower, 0, 4096, 1, 32, upper],
        )
    }

    #[test]
    fn a_handshake_comes_back_from_custody_as_it_went() {
        let context = Context::new(&request(HAS_RESEND | INIT_EXT), &reply(40, 1)).unwrap();
        let bytes = context.encode();
        assert_eq!(bytes[0], 1);
        assert_eq!(Context::decode(&bytes), Ok(context));
        for length in 0..bytes.len() {
            assert!(Context::decode(&bytes[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn other_bytes_are_refused_with_what_is_wrong() {
        for (bytes, want) in [
            (vec![], "it ends too early"),
            (vec![1, 5], "it ends too early"),
            (
                vec![2, 0, 0],
                "its format is version 2; version 1 is understood",
            ),
            (vec![1, 0, 0], "the INIT request is not as long as it says"),
        ] {
            assert_eq!(Context::decode(&bytes).unwrap_err().to_string(), want);
        }
        let mut other = request(0);
        other[4] = 1;
        assert_eq!(
            Context::new(&other, &reply(40, 0)).unwrap_err().to_string(),
            "the INIT request is no INIT request of FUSE 7"
        );
        let mut refusal = message(OUT_HEADER, &[]);
        refusal[4..8].copy_from_slice(&(-71_i32).to_ne_bytes());
        assert_eq!(
            Context::new(&request(0), &refusal).unwrap_err().to_string(),
            "the reply to INIT refuses the mount"
        );
    }

    #[test]
    fn a_kernel_that_cannot_resend_is_told_by_its_request() {
        let can = |flags| {
            Context::new(&request(flags), &reply(40, 0))
                .unwrap()
                .can_resend()
        };
        assert!(can(HAS_RESEND | INIT_EXT));
        assert!(
            !can(HAS_RESEND),
            "the upper half does not count without INIT_EXT"
        );
        assert!(!can(INIT_EXT));
    }

    #[test]
    fn a_server_must_keep_what_its_predecessor_promised() {
        let context = Context::new(&request(0), &reply(40, INIT_EXT | 0b11)).unwrap();
        assert!(context.agrees_with(&reply(40, INIT_EXT | 0b11)));
        assert!(context.agrees_with(&reply(40, INIT_EXT | HAS_RESEND | 0b111)));
        assert!(!context.agrees_with(&reply(40, INIT_EXT | 0b01)));
        assert!(!context.agrees_with(&reply(41, INIT_EXT | 0b11)));
    }
}
