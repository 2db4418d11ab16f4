//! Errors as people read them.

use std::error::Error;

/// An error with all its causes, on one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let why = error.to_string();
        // A wrapper that shows its cause's words does not say them twice.
        if !text.ends_with(&why) {
            text.push_str(": ");
            text.push_str(&why);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("opening the box")]
    struct Outer(#[source] io::Error);

    #[test]
    fn every_cause_is_told_once() {
        let error = Outer(io::Error::other("it is locked"));
        assert_eq!(chain(&error), "opening the box: it is locked");
        let wrapped = io::Error::other(error);
        assert_eq!(chain(&wrapped), "opening the box: it is locked");
    }
}
