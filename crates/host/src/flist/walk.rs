//! A path to what it leads to, links followed within the root. Knows no tree: whoever asks says what
//! a name in a directory is.

/// Symbolic links that are followed in one path.
const MAX_HOPS: u32 = 40;

/// `look` is asked for a name in a directory: what it is, and where it points if it is a link.
pub(super) fn walk<N: Copy>(
    root: N,
    path: &str,
    mut look: impl FnMut(N, &[u8]) -> Result<(N, Option<Vec<u8>>), String>,
) -> Result<N, String> {
    let mut hops = 0;
    let mut parts: Vec<Vec<u8>> = path.split('/').rev().map(|p| p.as_bytes().to_vec()).collect();
    // All that is above, so that `..` goes back and no higher than the root.
    let mut above = Vec::new();
    let mut at = root;
    while let Some(part) = parts.pop() {
        match part.as_slice() {
            b"" | b"." => continue,
            b".." => {
                at = above.pop().unwrap_or(root);
                continue;
            }
            _ => {}
        }
        let (next, target) = look(at, &part)?;
        let Some(target) = target else {
            above.push(std::mem::replace(&mut at, next));
            continue;
        };
        hops += 1;
        if hops > MAX_HOPS {
            return Err("too many symbolic links".into());
        }
        if target.starts_with(b"/") {
            above.clear();
            at = root;
        }
        parts.extend(target.split(|b| *b == b'/').rev().map(<[u8]>::to_vec));
    }
    Ok(at)
}
