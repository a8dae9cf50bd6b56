//! An flist with a layer above it, as one tree: names, attributes, bytes. Inode numbers of the
//! flist are its index's plus one, so that the root is 1 as everybody expects. Knows no protocol.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lodge_formats::flist::{Index, Kind, Node};

use super::fetch::Fetcher;
use super::layer::{Attr, FIRST_OWN, Layer, Time};

pub(super) const ROOT: u64 = 1;
const MAX_NAME: usize = 255;
const MAX_LINKS: u32 = 65_000;
/// Changes are safe on the host's disk after this, at the latest.
const COMMIT: Duration = Duration::from_secs(5);

pub struct Tree {
    pub(super) index: Arc<Index>,
    pub(super) fetcher: Arc<Fetcher>,
    layer: Mutex<Layer>,
    changed: Condvar,
}

pub(super) fn error(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

pub(super) fn now() -> Time {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (since.as_secs() as i64, since.subsec_nanos())
}

/// One name of a directory, and where the listing goes on behind it.
pub(super) struct Listed {
    pub(super) name: Vec<u8>,
    pub(super) ino: u64,
    pub(super) next: u64,
}

impl Tree {
    pub fn open(index: Arc<Index>, fetcher: Arc<Fetcher>, layer: &Path) -> io::Result<Self> {
        let layer = Mutex::new(Layer::open(layer)?);
        Ok(Self { index, fetcher, layer, changed: Condvar::new() })
    }

    pub(super) fn layer(&self) -> MutexGuard<'_, Layer> {
        self.layer.lock().expect("not poisoned")
    }

    /// The flist's node behind an inode.
    fn node(&self, ino: u64) -> Option<&Node> {
        (ino < FIRST_OWN).then(|| self.index.node(u32::try_from(ino.checked_sub(1)?).ok()?))?
    }

    pub(super) fn attr_in(&self, layer: &Layer, ino: u64) -> io::Result<Attr> {
        if let Some(attr) = layer.attrs.get(&ino) {
            return Ok(attr.clone());
        }
        let node = self.node(ino).ok_or_else(|| error(libc::ENOENT))?;
        let time = (node.time, 0);
        let (major, minor) = node.device();
        let target = self.index.target(node).to_vec();
        let size = match node.kind {
            Kind::Directory => 4096,
            Kind::Symlink => target.len() as u64,
            _ => node.size,
        };
        Ok(Attr {
            mode: node.kind.bits() | u32::from(node.mode),
            uid: node.uid,
            gid: node.gid,
            size,
            rdev: match node.kind {
                Kind::BlockDevice | Kind::CharDevice => encode_device(major, minor),
                _ => 0,
            },
            nlink: 1,
            below: node.size,
            target,
            atime: time,
            mtime: time,
            ctime: time,
        })
    }

    pub(super) fn attr(&self, ino: u64) -> io::Result<Attr> {
        self.attr_in(&self.layer(), ino)
    }

    pub(super) fn lookup_in(&self, layer: &Layer, dir: u64, name: &[u8]) -> io::Result<u64> {
        if let Some(changed) = layer.names.get(&dir).and_then(|names| names.by_name.get(name)) {
            return changed.map(|(ino, _)| ino).ok_or_else(|| error(libc::ENOENT));
        }
        if dir >= FIRST_OWN {
            return Err(error(libc::ENOENT));
        }
        let found = self.index.lookup((dir - 1) as u32, name).ok_or_else(|| error(libc::ENOENT))?;
        Ok(u64::from(found) + 1)
    }

    /// Up to `most` names from a place on; places are those of `Listed`, and 0 is the start.
    pub(super) fn list(&self, layer: &Layer, dir: u64, from: u64, most: usize) -> Vec<Listed> {
        let mut all = Vec::new();
        if layer.attrs.get(&dir).is_some_and(|attr| attr.nlink == 0) {
            return all;
        }
        let names = layer.names.get(&dir);
        if let Some(node) = self.node(dir).filter(|_| from < FIRST_OWN) {
            let range = self.index.children(node);
            for number in range.start.max(from as u32)..range.end {
                if all.len() >= most {
                    return all;
                }
                let name = self.index.name(self.index.node(number).expect("a child"));
                if names.is_none_or(|n| !n.by_name.contains_key(name)) {
                    let ino = u64::from(number) + 1;
                    all.push(Listed { name: name.to_vec(), ino, next: ino });
                }
            }
        }
        let from = from.saturating_sub(FIRST_OWN);
        for (place, (name, ino)) in names.into_iter().flat_map(|n| n.by_place.range(from..)) {
            if all.len() >= most {
                break;
            }
            all.push(Listed { name: name.to_vec(), ino: *ino, next: FIRST_OWN + place + 1 });
        }
        all
    }

    fn is_empty(&self, layer: &Layer, dir: u64) -> bool {
        self.list(layer, dir, 0, 1).is_empty()
    }

    /// Tells whoever commits that there is something.
    fn note(&self) {
        self.changed.notify_one();
    }

    fn touch(&self, layer: &mut Layer, ino: u64) -> io::Result<()> {
        let mut attr = self.attr_in(layer, ino)?;
        attr.mtime = now();
        attr.ctime = attr.mtime;
        layer.set(ino, attr)
    }

    pub(super) fn update<T>(
        &self,
        ino: u64,
        change: impl FnOnce(&mut Attr) -> T,
    ) -> io::Result<(T, Attr)> {
        let mut layer = self.layer();
        let mut attr = self.attr_in(&layer, ino)?;
        let value = change(&mut attr);
        attr.ctime = now();
        layer.set(ino, attr.clone())?;
        self.note();
        Ok((value, attr))
    }

    /// Makes a file of any kind.
    pub(super) fn make(&self, dir: u64, name: &CStr, attr: Attr) -> io::Result<(u64, Attr)> {
        let name = checked(name)?;
        let mut layer = self.layer();
        let parent = self.attr_in(&layer, dir)?;
        if !parent.is(libc::S_IFDIR) {
            return Err(error(libc::ENOTDIR));
        }
        if parent.nlink == 0 {
            return Err(error(libc::ENOENT));
        }
        if self.lookup_in(&layer, dir, name).is_ok() {
            return Err(error(libc::EEXIST));
        }
        let ino = layer.number();
        let mut attr = attr;
        if parent.mode & libc::S_ISGID != 0 {
            attr.gid = parent.gid;
            if attr.is(libc::S_IFDIR) {
                attr.mode |= libc::S_ISGID;
            }
        }
        layer.set(ino, attr.clone())?;
        layer.put_name(dir, name, Some(ino))?;
        self.touch(&mut layer, dir)?;
        self.note();
        Ok((ino, attr))
    }

    /// Takes a name away; the flist's own stays hidden.
    fn unname(&self, layer: &mut Layer, dir: u64, name: &[u8]) -> io::Result<()> {
        let below = dir < FIRST_OWN && self.index.lookup((dir - 1) as u32, name).is_some();
        match below {
            true => layer.put_name(dir, name, None),
            false => layer.drop_name(dir, name),
        }
    }

    /// Takes one link of a file away. Its bytes go when nobody has it open any more.
    fn unlink_ino(&self, layer: &mut Layer, ino: u64) -> io::Result<()> {
        let mut attr = self.attr_in(layer, ino)?;
        attr.nlink = match attr.is(libc::S_IFDIR) {
            true => 0,
            false => attr.nlink.saturating_sub(1),
        };
        attr.ctime = now();
        if attr.is(libc::S_IFDIR) {
            layer.drop_names(ino)?;
        }
        layer.set(ino, attr)
    }

    pub(super) fn remove(&self, dir: u64, name: &CStr, directory: bool) -> io::Result<()> {
        let name = checked(name)?;
        let mut layer = self.layer();
        let ino = self.lookup_in(&layer, dir, name)?;
        let is_directory = self.attr_in(&layer, ino)?.is(libc::S_IFDIR);
        match (directory, is_directory) {
            (true, false) => return Err(error(libc::ENOTDIR)),
            (false, true) => return Err(error(libc::EISDIR)),
            (true, true) if !self.is_empty(&layer, ino) => return Err(error(libc::ENOTEMPTY)),
            _ => {}
        }
        self.unname(&mut layer, dir, name)?;
        self.unlink_ino(&mut layer, ino)?;
        self.touch(&mut layer, dir)?;
        self.note();
        Ok(())
    }

    pub(super) fn link(&self, ino: u64, dir: u64, name: &CStr) -> io::Result<Attr> {
        let name = checked(name)?;
        let mut layer = self.layer();
        let mut attr = self.attr_in(&layer, ino)?;
        if attr.is(libc::S_IFDIR) {
            return Err(error(libc::EPERM));
        }
        if self.lookup_in(&layer, dir, name).is_ok() {
            return Err(error(libc::EEXIST));
        }
        if attr.nlink >= MAX_LINKS {
            return Err(error(libc::EMLINK));
        }
        attr.nlink += 1;
        attr.ctime = now();
        layer.set(ino, attr.clone())?;
        layer.put_name(dir, name, Some(ino))?;
        self.touch(&mut layer, dir)?;
        self.note();
        Ok(attr)
    }

    /// Gives a file another name, in the place of whatever has it.
    pub(super) fn rename(
        &self,
        from: (u64, &CStr),
        to: (u64, &CStr),
        flags: u32,
    ) -> io::Result<()> {
        let ((dir, name), (to_dir, to_name)) = ((from.0, checked(from.1)?), (to.0, checked(to.1)?));
        let mut layer = self.layer();
        let ino = self.lookup_in(&layer, dir, name)?;
        let old = self.lookup_in(&layer, to_dir, to_name).ok();
        let is_directory = self.attr_in(&layer, ino)?.is(libc::S_IFDIR);
        match flags {
            libc::RENAME_EXCHANGE => {
                let old = old.ok_or_else(|| error(libc::ENOENT))?;
                layer.put_name(dir, name, Some(old))?;
                layer.put_name(to_dir, to_name, Some(ino))?;
                self.note();
                return Ok(());
            }
            libc::RENAME_NOREPLACE if old.is_some() => return Err(error(libc::EEXIST)),
            0 | libc::RENAME_NOREPLACE => {}
            _ => return Err(error(libc::EINVAL)),
        }
        if old == Some(ino) {
            return Ok(());
        }
        if let Some(old) = old {
            let old_is_directory = self.attr_in(&layer, old)?.is(libc::S_IFDIR);
            match (is_directory, old_is_directory) {
                (true, false) => return Err(error(libc::ENOTDIR)),
                (false, true) => return Err(error(libc::EISDIR)),
                (true, true) if !self.is_empty(&layer, old) => {
                    return Err(error(libc::ENOTEMPTY));
                }
                _ => {}
            }
            self.unlink_ino(&mut layer, old)?;
        }
        self.unname(&mut layer, dir, name)?;
        layer.put_name(to_dir, to_name, Some(ino))?;
        self.touch(&mut layer, dir)?;
        if to_dir != dir {
            self.touch(&mut layer, to_dir)?;
        }
        self.note();
        Ok(())
    }

    /// Fetches a file that is about to be read as a whole.
    pub(super) fn bring(&self, ino: u64) {
        if let Some(node) = self.node(ino) {
            let numbers: Vec<u32> = self.index.blocks(node).collect();
            self.fetcher.ahead(&self.index, &numbers);
        }
    }

    /// Bytes of a file; fewer at its end.
    pub(super) fn read(&self, ino: u64, offset: u64, size: usize) -> io::Result<Vec<u8>> {
        let (attr, data) = {
            let mut layer = self.layer();
            let attr = self.attr_in(&layer, ino)?;
            (attr, layer.data(ino, false)?)
        };
        let end = attr.size.min(offset.saturating_add(size as u64));
        let Some(length) = end.checked_sub(offset).filter(|l| *l > 0) else {
            return Ok(Vec::new());
        };
        let mut bytes = vec![0; length as usize];
        let piece = self.piece_size(ino);
        let mut at = offset;
        while at < end {
            let number = at / piece;
            let until = end.min((number + 1) * piece);
            let part = &mut bytes[(at - offset) as usize..(until - offset) as usize];
            if attr.below > number * piece && !self.layer().has_piece(ino, number) {
                // Behind what counts of it there are zeroes.
                let length = attr.below.min(until).saturating_sub(at) as usize;
                self.read_below(ino, number, at % piece, &mut part[..length])?;
            } else if let Some(data) = &data {
                read_data(data, part, at)?;
            }
            at = until;
        }
        Ok(bytes)
    }

    /// How many bytes are replaced together.
    fn piece_size(&self, ino: u64) -> u64 {
        let size = self.node(ino).map_or(0, |node| u64::from(node.block_size()));
        if size == 0 { u64::from(lodge_formats::flist::BLOCK) } else { size }
    }

    /// Bytes of the flist.
    fn read_below(&self, ino: u64, piece: u64, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let node = self.node(ino).ok_or_else(|| error(libc::EIO))?;
        let range = self.index.blocks(node);
        let number = u64::from(range.start) + piece;
        let number = u32::try_from(number).ok().filter(|n| range.contains(n));
        let number = number.ok_or_else(|| error(libc::EIO))?;
        let file = self.fetcher.block(&self.index, number, node.block_size()).map_err(|why| {
            super::server::complain(&self.index.path((ino - 1) as u32), number, &why);
            error(libc::EIO)
        })?;
        // A block that is too short for its place is as good as none.
        file.read_exact_at(bytes, at).map_err(|_| error(libc::EIO))
    }

    pub(super) fn write(&self, ino: u64, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64).ok_or_else(|| error(libc::EFBIG))?;
        let piece = self.piece_size(ino);
        let below = self.attr(ino)?.below;
        let pieces = offset / piece..=end.saturating_sub(1) / piece;
        for number in pieces.clone() {
            let (from, to) = (number * piece, ((number + 1) * piece).min(below));
            let whole = offset <= from && end >= to;
            if from < below && !whole && !self.layer().has_piece(ino, number) {
                let mut old = vec![0; (to - from) as usize];
                self.read_below(ino, number, 0, &mut old)?;
                let mut layer = self.layer();
                // Somebody else may have done so meanwhile, and written to it.
                if !layer.has_piece(ino, number) {
                    let data = layer.data(ino, true)?.expect("is made");
                    data.write_all_at(&old, from)?;
                    layer.put_piece(ino, number)?;
                }
            }
        }
        let mut layer = self.layer();
        let data = layer.data(ino, true)?.expect("is made");
        data.write_all_at(bytes, offset)?;
        if below > 0 {
            for number in pieces {
                layer.put_piece(ino, number)?;
            }
        }
        let mut attr = self.attr_in(&layer, ino)?;
        attr.size = attr.size.max(end);
        attr.mtime = now();
        attr.ctime = attr.mtime;
        layer.set(ino, attr)?;
        self.note();
        Ok(())
    }

    /// Cuts a file or makes it longer.
    pub(super) fn resize(&self, ino: u64, size: u64) -> io::Result<()> {
        let mut layer = self.layer();
        let mut attr = self.attr_in(&layer, ino)?;
        if size < attr.size
            && let Some(data) = layer.data(ino, false)?
            && data.metadata()?.len() > size
        {
            layer.data(ino, true)?;
            data.set_len(size)?;
        }
        attr.size = size;
        attr.below = attr.below.min(size);
        attr.mtime = now();
        attr.ctime = attr.mtime;
        layer.set(ino, attr)?;
        self.note();
        Ok(())
    }

    /// Nobody refers to an inode any more.
    pub(super) fn forget(&self, ino: u64) {
        let mut layer = self.layer();
        if layer.attrs.get(&ino).is_some_and(|attr| attr.nlink == 0) && ino >= FIRST_OWN {
            // What stays is taken away at the next start.
            let _ = layer.destroy(ino);
        } else if layer.attrs.get(&ino).is_some_and(|attr| attr.nlink == 0) {
            let _ = layer.drop_data(ino);
        }
    }

    /// Makes everything safe. Others wait meanwhile.
    pub fn sync(&self) -> io::Result<()> {
        self.layer().commit()
    }

    /// Makes changes safe, some time after the first of them, for ever.
    pub(super) fn keep_safe(&self) {
        loop {
            let mut layer = self.layer();
            while !layer.is_changed() {
                layer = self.changed.wait(layer).expect("not poisoned");
            }
            drop(layer);
            std::thread::sleep(COMMIT);
            if let Err(error) = self.sync() {
                super::server::complain("the layer", 0, &error.to_string());
            }
        }
    }
}

fn read_data(data: &File, mut part: &mut [u8], mut at: u64) -> io::Result<()> {
    // What is behind its end was never written.
    while !part.is_empty() {
        match data.read_at(part, at)? {
            0 => return Ok(()),
            count => {
                part = &mut part[count..];
                at += count as u64;
            }
        }
    }
    Ok(())
}

/// As the kernel puts a device's two numbers into one of 32 bits.
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & !0xff) << 12
}

/// The two numbers again.
pub(super) fn decode_device(rdev: u32) -> (u32, u32) {
    (rdev >> 8 & 0xfff, rdev & 0xff | rdev >> 12 & !0xff)
}

fn checked(name: &CStr) -> io::Result<&[u8]> {
    let name = name.to_bytes();
    if name.len() > MAX_NAME {
        return Err(error(libc::ENAMETOOLONG));
    }
    match name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
        true => Err(error(libc::EINVAL)),
        false => Ok(name),
    }
}
