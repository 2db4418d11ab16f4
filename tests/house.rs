//! The law of the house, read from the sources: who may name whom, which files are pure, and that
//! every file says what it is.
//!
//! What tests name is their own business: items marked `#[cfg(test)]` are not looked at.

// Clippy takes the functions shared by tests for production code.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

/// Each room, and the rooms it may name. Rooms of the shard are named with it. A room not listed
/// here may be named by the composers alone.
const LAW: &[(&str, &[&str])] = &[
    ("readiness", &[]),
    ("telemetry", &[]),
    ("http", &[]),
    ("sockets", &[]),
    ("csi", &["volumes", "readiness", "sockets"]),
    ("volumes", &["mounts", "runtimes", "readiness"]),
    ("mounts", &[]),
    ("fuse", &["mounts"]),
    ("runtimes", &["readiness"]),
    ("render", &["runtimes"]),
    ("webhook", &["runtimes"]),
    ("supervisor", &["readiness"]),
    ("shard/ids", &[]),
    (
        "shard/server",
        &["shard/protocol", "shard/store", "shard/ids", "sockets"],
    ),
    (
        "shard/store",
        &[
            "shard/memory",
            "shard/catalog",
            "shard/spill",
            "shard/metadata",
            "shard/ids",
        ],
    ),
    ("shard/client", &["shard/protocol", "shard/ids"]),
    ("shard/protocol", &["shard/ids"]),
    ("shard/memory", &["shard/ids"]),
    ("shard/catalog", &["shard/ids"]),
    ("shard/spill", &["shard/ids"]),
    ("shard/metadata", &[]),
    (
        "shard",
        &[
            "shard/ids",
            "shard/server",
            "shard/store",
            "shard/client",
            "shard/protocol",
            "shard/memory",
            "shard/catalog",
            "shard/spill",
            "shard/metadata",
        ],
    ),
];

/// Those who put the rooms together: they may name everything, and only they each other.
const COMPOSERS: &[&str] = &["main", "cli", "agent", "node"];

/// The pure files (`●`): a folder stands for all its files. What is not there yet is pure once
/// it is.
const PURE: &[&str] = &[
    "readiness.rs",
    "csi/request.rs",
    "csi/status.rs",
    "volumes/plan.rs",
    "volumes/in_flight.rs",
    "mounts/table.rs",
    "fuse/tree.rs",
    "runtimes/spec.rs",
    "runtimes/quantity.rs",
    "runtimes/layout.rs",
    "runtimes/reconcile.rs",
    "supervisor/policy.rs",
    "supervisor/message.rs",
    "shard/ids.rs",
    "shard/protocol/",
    "shard/store/state.rs",
    "shard/store/blob.rs",
    "shard/store/object.rs",
    "shard/store/name.rs",
    "shard/store/stream.rs",
    "shard/store/lease.rs",
    "shard/store/eviction.rs",
    "shard/memory/allocator.rs",
    "shard/catalog/record.rs",
    "shard/spill/format.rs",
];

/// What a pure file does not name: doors to the kernel, to other threads and to the clock.
const IMPURE: &[&str] = &[
    "std::env",
    "std::fs",
    "std::net",
    "std::os::unix::net",
    "std::process",
    "std::thread",
    "std::io::stdin",
    "std::io::stdout",
    "std::io::stderr",
    "Instant::now",
    "SystemTime::now",
    "libc",
    "nix",
    "notify",
    "rustix",
    "tokio",
    "hyper",
    "tonic::transport",
];

/// One breach: the file, and what is wrong with it.
type Breach = (String, String);

#[test]
fn the_house_obeys_its_law() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&src, &mut files);
    assert!(files.len() > 20, "the sources are not where they should be");
    let breaches: Vec<_> = files
        .iter()
        .flat_map(|path| {
            let text = std::fs::read_to_string(path).unwrap();
            let name = path
                .strip_prefix(&src)
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned();
            breaches(&name, &text)
        })
        .map(|(file, what)| format!("src/{file}: {what}"))
        .collect();
    assert!(breaches.is_empty(), "\n{}", breaches.join("\n"));
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            files.push(path);
        }
    }
    files.sort();
}

/// What is wrong with the file `name` (its path below `src`) that reads `text`.
fn breaches(name: &str, text: &str) -> Vec<Breach> {
    let mut found = Vec::new();
    let mut breach = |what: String| found.push((name.to_owned(), what));
    if !text.starts_with("//! ") {
        breach("does not begin by saying what it is (`//! …`)".to_owned());
    }
    let tokens = without_tests(&tokens(text));
    let module = module_of(name);
    let paths = paths(&tokens, &module);
    let here = room_of(&module);
    for path in &paths {
        let Some((first, names)) = path.split_first() else {
            continue;
        };
        if first != "crate" {
            continue;
        }
        let there = room_of(names);
        if !may_name(&here, &there) {
            breach(format!(
                "{here} may not name {there}, but names {}",
                path.join("::")
            ));
        }
    }
    if is_pure(name) {
        for path in &paths {
            let text = path.join("::");
            // The system's numbers are values like others.
            let is_constant = |name: &String| !name.contains(char::is_lowercase);
            if path[0] == "libc" && path.last().is_some_and(is_constant) {
                continue;
            }
            let is_named = |door: &&&str| {
                let door: Vec<_> = door.split("::").collect();
                match door[0].starts_with(char::is_uppercase) {
                    // A type, by whatever path.
                    true => path.windows(door.len()).any(|part| part == door),
                    false => path.len() >= door.len() && path[..door.len()] == door[..],
                }
            };
            if let Some(door) = IMPURE.iter().find(is_named) {
                breach(format!("is pure, but names {door} ({text})"));
            }
        }
        if tokens
            .iter()
            .any(|token| token == "async" || token == "await")
        {
            breach("is pure, but waits (`async`)".to_owned());
        }
    }
    found.dedup();
    found
}

fn may_name(here: &str, there: &str) -> bool {
    // `lib` is the map: it declares the rooms.
    if here == there || here == "lib" || COMPOSERS.contains(&here) {
        return true;
    }
    let law = LAW.iter().find(|(room, _)| *room == here);
    law.is_some_and(|(_, rooms)| rooms.contains(&there))
}

fn is_pure(name: &str) -> bool {
    PURE.iter().any(|pure| match pure.strip_suffix('/') {
        Some(_) => name.starts_with(pure),
        None => name == *pure,
    })
}

/// `shard/store/mod.rs` → `shard`, `store`.
fn module_of(name: &str) -> Vec<String> {
    let path = name.trim_end_matches(".rs");
    let mut module: Vec<_> = path.split('/').map(str::to_owned).collect();
    if module.last().is_some_and(|last| last == "mod") {
        module.pop();
    }
    module
}

/// The room a path of modules leads into: `shard`, `store`, `Blob` → `shard/store`.
fn room_of(module: &[String]) -> String {
    let deep = module.iter().take(2).cloned().collect::<Vec<_>>().join("/");
    match LAW.iter().any(|(room, _)| *room == deep) {
        true => deep,
        false => module.first().cloned().unwrap_or_default(),
    }
}

/// Identifiers and punctuation, without comments, texts and lifetimes; `::` is one token.
fn tokens(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut tokens = Vec::new();
    let mut i = 0;
    while i < chars.len() {
        let c = at(i);
        if c == '/' && at(i + 1) == '/' {
            while i < chars.len() && at(i) != '\n' {
                i += 1;
            }
        } else if c == '/' && at(i + 1) == '*' {
            let mut depth = 0;
            loop {
                match (at(i), at(i + 1)) {
                    ('/', '*') => (depth, i) = (depth + 1, i + 2),
                    ('*', '/') => (depth, i) = (depth - 1, i + 2),
                    _ => i += 1,
                }
                if depth == 0 || i >= chars.len() {
                    break;
                }
            }
        } else if c == '"' {
            i = end_of_text(&chars, i);
        } else if c == '\'' {
            // A character, or a lifetime.
            if at(i + 1) == '\\' {
                i += 3;
                while i < chars.len() && at(i) != '\'' {
                    i += 1;
                }
                i += 1;
            } else if at(i + 2) == '\'' {
                i += 3;
            } else {
                i += 1;
                while is_word(at(i)) {
                    i += 1;
                }
            }
        } else if is_word(c) {
            let start = i;
            while is_word(at(i)) {
                i += 1;
            }
            let word: String = chars[start..i].iter().collect();
            let is_prefix = matches!(word.as_str(), "b" | "c" | "r" | "br" | "cr");
            let hashes = (i..).take_while(|&j| at(j) == '#').count();
            if is_prefix && word.ends_with('r') && at(i + hashes) == '"' {
                i = end_of_raw_text(&chars, i + hashes + 1, hashes);
            } else if is_prefix && at(i) == '"' {
                i = end_of_text(&chars, i);
            } else {
                tokens.push(word);
            }
        } else if c == ':' && at(i + 1) == ':' {
            tokens.push("::".to_owned());
            i += 2;
        } else {
            if !c.is_whitespace() {
                tokens.push(c.to_string());
            }
            i += 1;
        }
    }
    tokens
}

fn end_of_text(chars: &[char], quote: usize) -> usize {
    let mut i = quote + 1;
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

fn end_of_raw_text(chars: &[char], start: usize, hashes: usize) -> usize {
    let closes = |i: usize| {
        chars[i] == '"'
            && chars[i + 1..]
                .iter()
                .take(hashes)
                .filter(|&&c| c == '#')
                .count()
                == hashes
    };
    let end = (start..chars.len())
        .find(|&i| closes(i))
        .unwrap_or(chars.len());
    end + 1 + hashes
}

/// Leaves out every item marked `#[cfg(test)]`: to its `;` or the end of its block.
fn without_tests(tokens: &[String]) -> Vec<String> {
    let mark = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::new();
    let mut i = 0;
    while i < tokens.len() {
        if !tokens[i..].iter().take(mark.len()).eq(mark.iter()) {
            kept.push(tokens[i].clone());
            i += 1;
            continue;
        }
        i += mark.len();
        let mut depth = 0_i32;
        while i < tokens.len() {
            let token = tokens[i].as_str();
            i += 1;
            match token {
                "{" | "(" | "[" => depth += 1,
                "}" | ")" | "]" => depth -= 1,
                _ => {}
            }
            if depth == 0 && matches!(token, "}" | ";") {
                break;
            }
        }
    }
    kept
}

/// Every path that is written out, groups of `use` taken apart, `super` and `self` resolved
/// against `module`: those within this crate begin with `crate`.
fn paths(tokens: &[String], module: &[String]) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    // The inline modules around, by the depth of their braces.
    let mut inline: Vec<(usize, String)> = Vec::new();
    let mut depth = 0;
    let mut i = 0;
    while i < tokens.len() {
        let token = tokens[i].as_str();
        let next = tokens.get(i + 1).map(String::as_str);
        let is_inline = token == "mod" && tokens.get(i + 2).is_some_and(|t| t == "{");
        match token {
            "{" => depth += 1,
            "}" => {
                depth -= 1;
                if inline.last().is_some_and(|(at, _)| *at == depth) {
                    inline.pop();
                }
            }
            _ if is_inline => inline.push((depth, tokens[i + 1].clone())),
            _ => {}
        }
        let is_start = next == Some("::") && is_name(token) && (i == 0 || tokens[i - 1] != "::");
        if is_start {
            let mut around = module.to_vec();
            around.extend(inline.iter().map(|(_, name)| name.clone()));
            let mut written = Vec::new();
            i = read_path(tokens, i, &mut Vec::new(), &mut written);
            found.extend(written.iter().map(|path| resolve(path, &around)));
            continue;
        }
        i += 1;
    }
    found
}

fn is_name(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Reads the path that begins at `i`, behind `prefix`; returns where it ends.
fn read_path(
    tokens: &[String],
    mut i: usize,
    prefix: &mut Vec<String>,
    found: &mut Vec<Vec<String>>,
) -> usize {
    let length = prefix.len();
    loop {
        match tokens.get(i).map(String::as_str) {
            Some("{") => {
                i += 1;
                while tokens.get(i).is_some_and(|token| token != "}") {
                    if tokens[i] == "," {
                        i += 1;
                    } else {
                        i = read_path(tokens, i, prefix, found);
                        // `as name`
                        while tokens
                            .get(i)
                            .is_some_and(|token| token != "," && token != "}")
                        {
                            i += 1;
                        }
                    }
                }
                prefix.truncate(length);
                return i + 1;
            }
            Some(token) if is_name(token) => {
                prefix.push(token.to_owned());
                i += 1;
            }
            // `*`, or the `<` of `::<`
            _ => {
                found.push(prefix.clone());
                prefix.truncate(length);
                return i.max(1);
            }
        }
        if tokens.get(i).is_some_and(|token| token == "::") {
            i += 1;
        } else {
            found.push(prefix.clone());
            prefix.truncate(length);
            return i;
        }
    }
}

fn resolve(path: &[String], around: &[String]) -> Vec<String> {
    let first = path.first().map(String::as_str);
    if !matches!(first, Some("super" | "self")) {
        return path.to_vec();
    }
    let mut absolute = around.to_vec();
    let mut rest = path;
    while let Some((first, others)) = rest.split_first() {
        match first.as_str() {
            "self" => {}
            "super" => {
                absolute.pop();
            }
            _ => break,
        }
        rest = others;
    }
    let mut resolved = vec!["crate".to_owned()];
    resolved.extend(absolute);
    resolved.extend_from_slice(rest);
    resolved
}

fn check(name: &str, text: &str, expected: &[&str]) {
    let found: Vec<_> = breaches(name, text)
        .into_iter()
        .map(|(_, what)| what)
        .collect();
    assert_eq!(found, expected, "{name}: {text}");
}

#[test]
fn a_room_that_names_a_forbidden_one_is_found_however_it_does() {
    let csi = "csi may not name mounts, but names crate::mounts";
    check(
        "csi/node.rs",
        "//! x\nuse crate::mounts::Place;",
        &[&format!("{csi}::Place")],
    );
    check(
        "csi/node.rs",
        "//! x\nuse crate::{volumes::V, mounts::{Place, Found as F}};",
        &[&format!("{csi}::Place"), &format!("{csi}::Found")],
    );
    check(
        "csi/node.rs",
        "//! x\nfn f() { crate::mounts::g::<u8>(); }",
        &[&format!("{csi}::g")],
    );
    check(
        "csi/node.rs",
        "//! x\nuse super::super::mounts::Place;",
        &[&format!("{csi}::Place")],
    );
    check(
        "csi/node.rs",
        "//! x\nmod a { mod b { use super::super::super::super::mounts::P; } }",
        &[&format!("{csi}::P")],
    );
    check("csi/mod.rs", "//! x\nuse super::mounts;", &[csi]);
    check("csi/mod.rs", "//! x\npub use crate::mounts::*;", &[csi]);
    check(
        "csi/mod.rs",
        "//! x\nconst X: &str = \"a\\\"\"; const Y: char = '\"'; use crate::mounts;",
        &[csi],
    );
}

#[test]
fn nothing_flows_up() {
    check(
        "mounts/linux.rs",
        "//! x\nuse crate::volumes::Volumes;",
        &["mounts may not name volumes, but names crate::volumes::Volumes"],
    );
    check(
        "supervisor/mod.rs",
        "//! x\nuse crate::telemetry;",
        &["supervisor may not name telemetry, but names crate::telemetry"],
    );
    check(
        "shard/protocol/frame.rs",
        "//! x\nuse super::super::store::Store;",
        &["shard/protocol may not name shard/store, but names crate::shard::store::Store"],
    );
    check(
        "shard/store/mod.rs",
        "//! x\nuse crate::readiness::Readiness;",
        &["shard/store may not name readiness, but names crate::readiness::Readiness"],
    );
    check(
        "shard/server/ipc.rs",
        "//! x\nuse crate::shard::Shard;",
        &["shard/server may not name shard, but names crate::shard::Shard"],
    );
    check(
        "novel.rs",
        "//! x\nuse crate::csi::X;",
        &["novel may not name csi, but names crate::csi::X"],
    );
    check(
        "csi/node.rs",
        "//! x\nuse crate::node::X;",
        &["csi may not name node, but names crate::node::X"],
    );
}

#[test]
fn what_the_law_allows_is_not_found() {
    check(
        "csi/node.rs",
        "//! x\nuse crate::volumes::Volumes; use super::request::R;",
        &[],
    );
    check(
        "csi/node.rs",
        "//! x\n// crate::mounts\n/* crate::mounts */ const X: &str = \"crate::mounts::X\";",
        &[],
    );
    check(
        "csi/node.rs",
        "//! x\nconst X: &str = r#\"\"crate::mounts::X\"#;",
        &[],
    );
    check(
        "csi/node.rs",
        "//! x\nfn f<'a>(x: &'a u8) {}\n#[cfg(test)]\nmod tests { use crate::mounts::fake; fn f() {} }",
        &[],
    );
    check(
        "csi/node.rs",
        "//! x\n#[cfg(test)]\nuse crate::mounts::fake;\nuse crate::volumes;",
        &[],
    );
    check(
        "shard/mod.rs",
        "//! x\nuse server::Server; use crate::shard::store::Store;",
        &[],
    );
    check(
        "node.rs",
        "//! x\nuse crate::{csi, mounts, shard::store};",
        &[],
    );
    check("lib.rs", "//! x\npub mod csi;", &[]);
}

#[test]
fn a_pure_file_that_does_something_is_found() {
    check(
        "volumes/plan.rs",
        "//! x\nuse std::fs::File;",
        &["is pure, but names std::fs (std::fs::File)"],
    );
    check(
        "volumes/plan.rs",
        "//! x\nuse std::{collections::BTreeMap, time::Instant};\nfn f() { Instant::now(); }",
        &["is pure, but names Instant::now (Instant::now)"],
    );
    check(
        "volumes/plan.rs",
        "//! x\nfn f() { std::time::SystemTime::now(); }",
        &["is pure, but names SystemTime::now (std::time::SystemTime::now)"],
    );
    check(
        "shard/protocol/new.rs",
        "//! x\nuse tokio::io::AsyncRead;",
        &["is pure, but names tokio (tokio::io::AsyncRead)"],
    );
    check(
        "fuse/tree.rs",
        "//! x\nfn f() { libc::open(); }",
        &["is pure, but names libc (libc::open)"],
    );
    check(
        "fuse/tree.rs",
        "//! x\nasync fn f() {}",
        &["is pure, but waits (`async`)"],
    );
    check(
        "fuse/tree.rs",
        "//! x\nuse std::time::Duration; use std::io::Error; const X: i32 = libc::O_RDONLY;",
        &[],
    );
    check("fuse/adapter.rs", "//! x\nuse std::fs::File;", &[]);
}

#[test]
fn a_file_that_does_not_say_what_it_is_is_found() {
    let breach = "does not begin by saying what it is (`//! …`)";
    check("http.rs", "use std::fmt;", &[breach]);
    check("http.rs", "", &[breach]);
}
