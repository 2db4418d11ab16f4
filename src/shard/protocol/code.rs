//! Status codes, numbered as vineyard numbers them.

/// Why a request failed, for programs. Clients branch on these numbers.
///
/// Vineyard also has 17 and 18 (spilled, not spilled); its Python client has no exception for
/// them, so they are never sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Code {
    Ok = 0,
    Invalid = 1,
    KeyError = 2,
    TypeError = 3,
    IoError = 4,
    EndOfFile = 5,
    NotImplemented = 6,
    AssertionFailed = 7,
    UserInputError = 8,
    ObjectExists = 11,
    ObjectNotExists = 12,
    ObjectSealed = 13,
    ObjectNotSealed = 14,
    ObjectIsBlob = 15,
    ObjectTypeError = 16,
    MetaTreeInvalid = 21,
    MetaTreeTypeInvalid = 22,
    MetaTreeTypeNotExists = 23,
    MetaTreeNameInvalid = 24,
    MetaTreeNameNotExists = 25,
    MetaTreeLinkInvalid = 26,
    MetaTreeSubtreeNotExists = 27,
    VineyardServerNotReady = 31,
    ArrowError = 32,
    ConnectionFailed = 33,
    ConnectionError = 34,
    EtcdError = 35,
    AlreadyStopped = 36,
    RedisError = 37,
    NotEnoughMemory = 41,
    StreamDrained = 42,
    StreamFailed = 43,
    InvalidStreamState = 44,
    StreamOpened = 45,
    GlobalObjectInvalid = 51,
    UnknownError = 255,
}

impl Code {
    /// The number on the wire.
    pub fn number(self) -> u8 {
        self as u8
    }
}
