//! Matching typenames and names: shell wildcards or regular expressions, always the whole text.
//!
//! Wildcards are those of fnmatch(3) without flags, in the C locale, so on bytes: `*` passes `/`
//! and a leading dot. Expressions are ECMAScript's as far as an engine without backtracking
//! goes: no look-around, no back-references. What is no valid expression matches nothing.

use regex::Regex;

/// A pattern that is ready to use.
#[derive(Debug)]
pub(super) enum Pattern {
    Wildcard(String),
    Expression(Regex),
    Nothing,
}

/// Bytes a compiled expression may take; a client chooses the expression.
const EXPRESSION_LIMIT: usize = 1 << 20;

impl Pattern {
    pub(super) fn new(pattern: &str, is_expression: bool) -> Self {
        if !is_expression {
            return Self::Wildcard(pattern.to_owned());
        }
        let pattern = translate(pattern);
        let compile = |text: &str| {
            regex::RegexBuilder::new(text)
                .size_limit(EXPRESSION_LIMIT)
                .build()
                .ok()
        };
        // Alone first: `a)(b` must not become valid by the brackets around it.
        compile(&pattern)
            .and_then(|_| compile(&format!(r"\A(?:{pattern})\z")))
            .map_or(Self::Nothing, Self::Expression)
    }

    pub(super) fn matches(&self, text: &str) -> bool {
        match self {
            Self::Wildcard(pattern) => wildcard(pattern.as_bytes(), text.as_bytes()),
            Self::Expression(expression) => expression.is_match(text),
            Self::Nothing => false,
        }
    }
}

/// An ECMAScript expression in the notation of the regex crate: what one takes literally and
/// the other specially gets a backslash, or loses it.
fn translate(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len() + 8);
    let mut in_class = false;
    let mut chars = pattern.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                // Identity escapes there, word boundaries here.
                Some(next @ ('<' | '>')) => out.push(next),
                Some(next) => out.extend(['\\', next]),
                None => out.push('\\'),
            },
            '[' if in_class && chars.peek() != Some(&':') => out.push_str(r"\["),
            '[' if in_class => out.push('['),
            '[' => {
                in_class = true;
                out.push('[');
                if chars.peek() == Some(&'^') {
                    out.extend(chars.next());
                }
            }
            ']' if in_class => {
                // `[:alpha:]` ends with the bracket of its own.
                in_class = out.ends_with(':')
                    && out.rfind("[:").is_some_and(|at| {
                        out[at + 2..]
                            .trim_end_matches(':')
                            .chars()
                            .all(|c| c.is_ascii_alphabetic())
                    });
                out.push(']');
            }
            // Set operations here, two literals there.
            '&' | '~' if in_class => out.extend(['\\', c]),
            '-' if in_class && out.ends_with('-') => out.push_str(r"\-"),
            _ => out.push(c),
        }
    }
    out
}

/// fnmatch(3) with no flags. A star that fails is tried again one byte later, and only the last
/// one: linear in the text for each star.
fn wildcard(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    loop {
        if pattern.get(p) == Some(&b'*') {
            p += 1;
            star = Some((p, t));
            continue;
        }
        let step = match text.get(t) {
            None if p == pattern.len() => return true,
            None => return false,
            Some(&byte) => one(&pattern[p..], byte),
        };
        if let Some(length) = step {
            p += length;
            t += 1;
        } else if let Some((after, from)) = star {
            star = Some((after, from + 1));
            (p, t) = (after, from + 1);
        } else {
            return false;
        }
    }
}

/// Matches one byte against the beginning of a pattern: how much of the pattern that uses up.
fn one(pattern: &[u8], byte: u8) -> Option<usize> {
    match *pattern.first()? {
        b'?' => Some(1),
        b'\\' => (*pattern.get(1)? == byte).then_some(2),
        b'[' => match bracket(&pattern[1..], byte) {
            Some((true, length)) => Some(1 + length),
            Some((false, _)) => None,
            // A bracket that nothing closes is a bracket.
            None => (byte == b'[').then_some(1),
        },
        literal => (literal == byte).then_some(1),
    }
}

/// A bracket expression after its `[`: whether the byte is in it, and how long it is.
fn bracket(pattern: &[u8], byte: u8) -> Option<(bool, usize)> {
    let negated = matches!(pattern.first(), Some(b'!' | b'^'));
    let first = usize::from(negated);
    let mut at = first;
    let mut found = false;
    loop {
        let low = match *pattern.get(at)? {
            b']' if at > first => return Some((found != negated, at + 1)),
            b'[' if pattern.get(at + 1) == Some(&b':') => {
                if let Some((class, length)) = class(&pattern[at + 2..]) {
                    found |= class(byte);
                    at += 2 + length;
                    continue;
                }
                b'['
            }
            b'\\' => {
                at += 1;
                *pattern.get(at)?
            }
            literal => literal,
        };
        at += 1;
        let mut high = low;
        if pattern.get(at) == Some(&b'-') && !matches!(pattern.get(at + 1), None | Some(b']')) {
            at += 1;
            if pattern[at] == b'\\' {
                at += 1;
            }
            high = *pattern.get(at)?;
            at += 1;
        }
        found |= (low..=high).contains(&byte);
    }
}

type Class = fn(u8) -> bool;

/// A character class after its `[:`: what it means, and how long it is with its `:]`.
fn class(pattern: &[u8]) -> Option<(Class, usize)> {
    let length = pattern.iter().position(|b| !b.is_ascii_lowercase())?;
    if !pattern[length..].starts_with(b":]") {
        return None;
    }
    let class: Class = match &pattern[..length] {
        b"alnum" => |b| b.is_ascii_alphanumeric(),
        b"alpha" => |b| b.is_ascii_alphabetic(),
        b"blank" => |b| b == b' ' || b == b'\t',
        b"cntrl" => |b| b.is_ascii_control(),
        b"digit" => |b| b.is_ascii_digit(),
        b"graph" => |b| b.is_ascii_graphic(),
        b"lower" => |b| b.is_ascii_lowercase(),
        b"print" => |b| b.is_ascii_graphic() || b == b' ',
        b"punct" => |b| b.is_ascii_punctuation(),
        b"space" => |b| b.is_ascii_whitespace() || b == 0x0b,
        b"upper" => |b| b.is_ascii_uppercase(),
        b"xdigit" => |b| b.is_ascii_hexdigit(),
        _ => return None,
    };
    Some((class, length + 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(pattern: &str, is_expression: bool, yes: &[&str], no: &[&str]) {
        let compiled = Pattern::new(pattern, is_expression);
        for text in yes {
            assert!(compiled.matches(text), "{pattern:?} should match {text:?}");
        }
        for text in no {
            assert!(
                !compiled.matches(text),
                "{pattern:?} should not match {text:?}"
            );
        }
    }

    #[test]
    fn wildcards_match_as_fnmatch_does() {
        check("*", false, &["", "a", "a/b", ".hidden"], &[]);
        check(
            "vineyard::Tensor*",
            false,
            &["vineyard::Tensor<int64>"],
            &["Tensor"],
        );
        check("*a*b*", false, &["ab", "xaybz", "aabb"], &["ba", ""]);
        check("a?c", false, &["abc", "a/c"], &["ac", "abbc"]);
        check("[a-c]x", false, &["ax", "cx"], &["dx", "x"]);
        check("[!a-c]", false, &["d", "-"], &["a", ""]);
        check("[^a]", false, &["b"], &["a"]);
        check("[]a]", false, &["]", "a"], &["b"]);
        check("[!]a]", false, &["b"], &["]", "a"]);
        check("[a-]", false, &["a", "-"], &["b"]);
        check("[[:digit:]x]", false, &["5", "x"], &["a", ":"]);
        check(r"\*", false, &["*"], &["a"]);
        check(r"[\]]", false, &["]"], &["\\"]);
        check("a[", false, &["a["], &["a"]);
        check("[ab", false, &["[ab"], &["a"]);
        check(r"a\", false, &[], &["a", r"a\"]);
        check("", false, &[""], &["a"]);
    }

    #[test]
    fn wildcards_cost_no_more_than_text_times_pattern() {
        let text = "a".repeat(20_000);
        check(&"*a".repeat(500), false, &[&text], &[]);
        check(&("*a".repeat(500) + "b"), false, &[], &[&text]);
    }

    #[test]
    fn expressions_match_the_whole_text() {
        check(
            "vineyard::.*<.*>",
            true,
            &["vineyard::Scalar<int>"],
            &["vineyard::Index"],
        );
        check("a|ab", true, &["a", "ab"], &["abc", "b"]);
        check("n.*", true, &["n1", "n"], &["an"]);
        check(
            r"Tensor\<int64\>",
            true,
            &["Tensor<int64>"],
            &["Tensorint64"],
        );
        check("[[]x", true, &["[x"], &["x"]);
        check("[[:alpha:]_]+", true, &["a_b"], &["a1"]);
        check("[a&&b]+", true, &["&", "ab"], &["c"]);
    }

    #[test]
    fn what_is_no_expression_matches_nothing() {
        for bad in [
            "(((",
            "a)(b",
            "[",
            r"\",
            "*",
            r"(a)\1",
            "(?=a)",
            "a{1000}{1000}{1000}",
        ] {
            check(bad, true, &[], &["", "a", bad]);
        }
    }
}
