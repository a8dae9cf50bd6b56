//! The tree in the words of FUSE, which virtio-fs speaks too. Two views: the tree as it is, and the
//! one that QEMU's 9p server shows to guests, where owners, modes and kinds of files are attributes
//! by name and the host sees nothing but plain files of one user.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FsOptions, OpenOptions, SetattrValid, stat64, statvfs64,
};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader,
    ZeroCopyWriter,
};

use super::layer::{Attr, Time};
use super::tree::{ROOT, Tree, error, now};

/// Whoever mounts the tree is the only one who changes it.
const FOR_EVER: Duration = Duration::from_secs(86_400);
const MAX_XATTR: usize = 64 << 10;
/// Names of one answer to a listing.
const LISTED: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Owners, modes and kinds as they are.
    Plain,
    /// As `security_model=mapped-xattr` wants it: all belongs to this user.
    Mapped { uid: u32 },
}

pub struct Fuse {
    tree: Arc<Tree>,
    view: View,
    /// How often the other side was told of an inode.
    told: Mutex<HashMap<u64, u64>>,
}

const MAPPED: &[u8] = b"user.virtfs.";

impl Fuse {
    pub fn new(tree: Arc<Tree>, view: View) -> Self {
        Self { tree, view, told: Mutex::default() }
    }

    fn stat(&self, ino: u64, attr: &Attr) -> stat64 {
        // SAFETY: all fields are plain numbers.
        let mut stat: stat64 = unsafe { std::mem::zeroed() };
        stat.st_ino = ino;
        stat.st_size = attr.size as i64;
        stat.st_blocks = attr.size.div_ceil(512) as i64;
        stat.st_blksize = 4096;
        stat.st_nlink = u64::from(attr.nlink);
        (stat.st_atime, stat.st_atime_nsec) = (attr.atime.0, i64::from(attr.atime.1));
        (stat.st_mtime, stat.st_mtime_nsec) = (attr.mtime.0, i64::from(attr.mtime.1));
        (stat.st_ctime, stat.st_ctime_nsec) = (attr.ctime.0, i64::from(attr.ctime.1));
        match self.view {
            View::Plain => {
                stat.st_mode = attr.mode;
                (stat.st_uid, stat.st_gid) = (attr.uid, attr.gid);
                stat.st_rdev = u64::from(attr.rdev);
            }
            View::Mapped { uid } => {
                stat.st_mode = match attr.is(libc::S_IFDIR) {
                    true => libc::S_IFDIR | 0o700,
                    false => libc::S_IFREG | 0o600,
                };
                (stat.st_uid, stat.st_gid) = (uid, uid);
            }
        }
        stat
    }

    fn entry(&self, ino: u64, attr: &Attr) -> Entry {
        *self.told.lock().expect("not poisoned").entry(ino).or_default() += 1;
        Entry {
            inode: ino,
            generation: 0,
            attr: self.stat(ino, attr),
            attr_flags: 0,
            attr_timeout: FOR_EVER,
            entry_timeout: FOR_EVER,
        }
    }

    fn untell(&self, ino: u64, count: u64) {
        let mut told = self.told.lock().expect("not poisoned");
        let Some(left) = told.get_mut(&ino) else { return };
        *left = left.saturating_sub(count);
        if *left == 0 {
            told.remove(&ino);
            drop(told);
            self.tree.forget(ino);
        }
    }

    /// The attributes of something new.
    fn fresh(&self, ctx: &Context, mode: u32, target: Vec<u8>, rdev: u32) -> Attr {
        let time = now();
        let (uid, gid) = match self.view {
            View::Plain => (ctx.uid, ctx.gid),
            // Said afterwards by name.
            View::Mapped { .. } => (0, 0),
        };
        let size = if mode & libc::S_IFMT == libc::S_IFDIR { 4096 } else { target.len() as u64 };
        let (atime, mtime, ctime) = (time, time, time);
        Attr { mode, uid, gid, size, rdev, nlink: 1, below: 0, target, atime, mtime, ctime }
    }

    fn make(&self, dir: u64, name: &CStr, attr: Attr) -> io::Result<Entry> {
        let (ino, attr) = self.tree.make(dir, name, attr)?;
        Ok(self.entry(ino, &attr))
    }

    /// What an attribute of the mapped view says.
    fn mapped(&self, ino: u64, what: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let attr = self.tree.attr(ino)?;
        Ok(match what {
            b"uid" => Some(attr.uid.to_le_bytes().to_vec()),
            b"gid" => Some(attr.gid.to_le_bytes().to_vec()),
            b"mode" => Some(attr.mode.to_le_bytes().to_vec()),
            b"rdev" if attr.rdev != 0 => Some(u64::from(attr.rdev).to_le_bytes().to_vec()),
            _ => None,
        })
    }

    fn set_mapped(&self, ino: u64, what: &[u8], value: &[u8]) -> io::Result<()> {
        let number = || -> io::Result<u32> {
            let four = value.get(..4).ok_or_else(|| error(libc::EINVAL))?;
            Ok(u32::from_le_bytes(four.try_into().expect("four")))
        };
        let number = number()?;
        if what == b"mode" && number & libc::S_IFMT == libc::S_IFLNK {
            // What was written to it is where it points.
            let target = self.tree.read(ino, 0, 4096)?;
            self.tree.layer().drop_data(ino)?;
            return self
                .tree
                .update(ino, |attr| {
                    attr.mode = number;
                    attr.target = target;
                    attr.below = 0;
                })
                .map(drop);
        }
        let change = |attr: &mut Attr| match what {
            b"uid" => attr.uid = number,
            b"gid" => attr.gid = number,
            b"mode" if number & libc::S_IFMT == 0 => {
                attr.mode = attr.mode & libc::S_IFMT | number & 0o7777;
            }
            // Nothing becomes a directory, and no directory becomes something else.
            b"mode" if attr.is(libc::S_IFDIR) != (number & libc::S_IFMT == libc::S_IFDIR) => {}
            b"mode" => attr.mode = number,
            b"rdev" => attr.rdev = number,
            _ => {}
        };
        self.tree.update(ino, change).map(drop)
    }
}

fn time(seconds: i64, nanoseconds: i64) -> Time {
    (seconds, u32::try_from(nanoseconds).unwrap_or(0).min(999_999_999))
}

fn kind_of(mode: u32) -> u32 {
    (mode & libc::S_IFMT) >> 12
}

impl FileSystem for Fuse {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let wanted = FsOptions::ASYNC_READ
            | FsOptions::BIG_WRITES
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::MAX_PAGES
            | FsOptions::CACHE_SYMLINKS
            | FsOptions::ZERO_MESSAGE_OPEN
            | FsOptions::ZERO_MESSAGE_OPENDIR
            | FsOptions::DO_READDIRPLUS
            | FsOptions::READDIRPLUS_AUTO;
        *self.told.lock().expect("not poisoned") = HashMap::from([(ROOT, 2)]);
        Ok(wanted & capable)
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let found = {
            let layer = self.tree.layer();
            let found = self.tree.lookup_in(&layer, parent, name.to_bytes());
            found.and_then(|ino| Ok((ino, self.tree.attr_in(&layer, ino)?)))
        };
        match found {
            Ok((ino, attr)) => Ok(self.entry(ino, &attr)),
            // What is not there stays so until whoever asks makes it.
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
                Ok(Entry { entry_timeout: FOR_EVER, ..Entry::default() })
            }
            Err(error) => Err(error),
        }
    }

    fn forget(&self, _: &Context, inode: u64, count: u64) {
        self.untell(inode, count);
    }

    fn batch_forget(&self, _: &Context, requests: Vec<(u64, u64)>) {
        requests.into_iter().for_each(|(inode, count)| self.untell(inode, count));
    }

    fn getattr(&self, _: &Context, ino: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        Ok((self.stat(ino, &self.tree.attr(ino)?), FOR_EVER))
    }

    fn setattr(
        &self,
        _: &Context,
        ino: u64,
        stat: stat64,
        _: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        if valid.contains(SetattrValid::SIZE) {
            self.tree.resize(ino, stat.st_size as u64)?;
        }
        let plain = self.view == View::Plain;
        let ((), attr) = self.tree.update(ino, |attr| {
            if plain && valid.contains(SetattrValid::MODE) {
                attr.mode = attr.mode & libc::S_IFMT | stat.st_mode & 0o7777;
            }
            if plain && valid.contains(SetattrValid::UID) {
                attr.uid = stat.st_uid;
            }
            if plain && valid.contains(SetattrValid::GID) {
                attr.gid = stat.st_gid;
            }
            if valid.contains(SetattrValid::ATIME_NOW) {
                attr.atime = now();
            } else if valid.contains(SetattrValid::ATIME) {
                attr.atime = time(stat.st_atime, stat.st_atime_nsec);
            }
            if valid.contains(SetattrValid::MTIME_NOW) {
                attr.mtime = now();
            } else if valid.contains(SetattrValid::MTIME) {
                attr.mtime = time(stat.st_mtime, stat.st_mtime_nsec);
            }
        })?;
        Ok((self.stat(ino, &attr), FOR_EVER))
    }

    fn readlink(&self, _: &Context, ino: u64) -> io::Result<Vec<u8>> {
        let attr = self.tree.attr(ino)?;
        if attr.is(libc::S_IFLNK) { Ok(attr.target) } else { Err(error(libc::EINVAL)) }
    }

    fn symlink(&self, ctx: &Context, target: &CStr, dir: u64, name: &CStr) -> io::Result<Entry> {
        let attr = self.fresh(ctx, libc::S_IFLNK | 0o777, target.to_bytes().to_vec(), 0);
        self.make(dir, name, attr)
    }

    fn mknod(
        &self,
        ctx: &Context,
        dir: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        _umask: u32,
    ) -> io::Result<Entry> {
        self.make(dir, name, self.fresh(ctx, mode, Vec::new(), rdev))
    }

    fn mkdir(
        &self,
        ctx: &Context,
        dir: u64,
        name: &CStr,
        mode: u32,
        _umask: u32,
    ) -> io::Result<Entry> {
        self.make(dir, name, self.fresh(ctx, libc::S_IFDIR | mode & 0o7777, Vec::new(), 0))
    }

    fn unlink(&self, _: &Context, dir: u64, name: &CStr) -> io::Result<()> {
        self.tree.remove(dir, name, false)
    }

    fn rmdir(&self, _: &Context, dir: u64, name: &CStr) -> io::Result<()> {
        self.tree.remove(dir, name, true)
    }

    fn rename(
        &self,
        _: &Context,
        dir: u64,
        name: &CStr,
        to: u64,
        to_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.tree.rename((dir, name), (to, to_name), flags)
    }

    fn link(&self, _: &Context, ino: u64, dir: u64, name: &CStr) -> io::Result<Entry> {
        let attr = self.tree.link(ino, dir, name)?;
        Ok(self.entry(ino, &attr))
    }

    fn open(
        &self,
        _: &Context,
        _: u64,
        _: u32,
        _: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        // There is nothing to keep, so the kernel need not ask again.
        Err(error(libc::ENOSYS))
    }

    fn opendir(&self, _: &Context, _: u64, _: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        Err(error(libc::ENOSYS))
    }

    fn create(
        &self,
        ctx: &Context,
        dir: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let mode = libc::S_IFREG | args.mode & 0o7777;
        let entry = match self.make(dir, name, self.fresh(ctx, mode, Vec::new(), 0)) {
            Err(e)
                if e.raw_os_error() == Some(libc::EEXIST)
                    && args.flags & libc::O_EXCL as u32 == 0 =>
            {
                self.lookup(ctx, dir, name)?
            }
            made => made?,
        };
        Ok((entry, None, OpenOptions::empty(), None))
    }

    fn read(
        &self,
        _: &Context,
        ino: u64,
        _: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        let attr = self.tree.attr(ino)?;
        if attr.is(libc::S_IFLNK) {
            // In the mapped view, where the link is a file.
            let from = usize::try_from(offset).unwrap_or(usize::MAX).min(attr.target.len());
            let part = &attr.target[from..attr.target.len().min(from + size as usize)];
            w.write_all(part)?;
            return Ok(part.len());
        }
        let bytes = self.tree.read(ino, offset, size as usize)?;
        w.write_all(&bytes)?;
        Ok(bytes.len())
    }

    fn write(
        &self,
        _: &Context,
        ino: u64,
        _: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: bool,
        _: u32,
        _: u32,
    ) -> io::Result<usize> {
        let mut bytes = vec![0; size as usize];
        r.read_exact(&mut bytes)?;
        self.tree.write(ino, offset, &bytes)?;
        Ok(bytes.len())
    }

    fn fsync(&self, _: &Context, _: u64, _: bool, _: u64) -> io::Result<()> {
        self.tree.sync()
    }

    fn fsyncdir(&self, _: &Context, _: u64, _: bool, _: u64) -> io::Result<()> {
        self.tree.sync()
    }

    fn fallocate(
        &self,
        _: &Context,
        ino: u64,
        _: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let end = offset.checked_add(length).ok_or_else(|| error(libc::EFBIG))?;
        match mode {
            0 if end > self.tree.attr(ino)?.size => self.tree.resize(ino, end),
            0 => Ok(()),
            m if m == libc::FALLOC_FL_KEEP_SIZE as u32 => Ok(()),
            _ => Err(error(libc::EOPNOTSUPP)),
        }
    }

    fn statfs(&self, _: &Context, _: u64) -> io::Result<statvfs64> {
        self.tree.layer().room()
    }

    fn setxattr(
        &self,
        _: &Context,
        ino: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        let name = name.to_bytes();
        if let (View::Mapped { .. }, Some(what)) = (self.view, name.strip_prefix(MAPPED))
            && matches!(what, b"uid" | b"gid" | b"mode" | b"rdev")
        {
            return self.set_mapped(ino, what, value);
        }
        if value.len() > MAX_XATTR {
            return Err(error(libc::E2BIG));
        }
        let mut layer = self.tree.layer();
        let there = layer.xattr(ino, name).is_some();
        match flags as i32 {
            libc::XATTR_CREATE if there => return Err(error(libc::EEXIST)),
            libc::XATTR_REPLACE if !there => return Err(error(libc::ENODATA)),
            _ => {}
        }
        layer.put_xattr(ino, name, Some(value))
    }

    fn getxattr(&self, _: &Context, ino: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let name = name.to_bytes();
        let mapped = match (self.view, name.strip_prefix(MAPPED)) {
            (View::Mapped { .. }, Some(what)) => self.mapped(ino, what)?,
            _ => None,
        };
        let value = match mapped {
            Some(value) => Some(value),
            None => self.tree.layer().xattr(ino, name).cloned(),
        };
        let value = value.ok_or_else(|| error(libc::ENODATA))?;
        match size as usize {
            0 => Ok(GetxattrReply::Count(value.len() as u32)),
            size if size < value.len() => Err(error(libc::ERANGE)),
            _ => Ok(GetxattrReply::Value(value)),
        }
    }

    fn listxattr(&self, _: &Context, ino: u64, size: u32) -> io::Result<ListxattrReply> {
        let names = self.tree.layer().xattr_names(ino);
        match size as usize {
            0 => Ok(ListxattrReply::Count(names.len() as u32)),
            size if size < names.len() => Err(error(libc::ERANGE)),
            _ => Ok(ListxattrReply::Names(names)),
        }
    }

    fn removexattr(&self, _: &Context, ino: u64, name: &CStr) -> io::Result<()> {
        let mut layer = self.tree.layer();
        if layer.xattr(ino, name.to_bytes()).is_none() {
            return Err(error(libc::ENODATA));
        }
        layer.put_xattr(ino, name.to_bytes(), None)
    }

    fn readdir(
        &self,
        _: &Context,
        ino: u64,
        _: u64,
        _: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.each(ino, offset, |_, entry| add(entry))
    }

    fn readdirplus(
        &self,
        _: &Context,
        ino: u64,
        _: u64,
        _: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.each(ino, offset, |attr, entry| {
            let ino = entry.ino;
            let (told, dots) = (self.entry(ino, attr), matches!(entry.name, b"." | b".."));
            let added = add(entry, told);
            // What did not fit, and what nobody looks up, was not told.
            if dots || !matches!(added, Ok(n) if n > 0) {
                self.untell(ino, 1);
            }
            added
        })
    }
}

impl Fuse {
    /// Everything in a directory from a place on, until no more is taken.
    fn each(
        &self,
        dir: u64,
        offset: u64,
        mut add: impl FnMut(&Attr, DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        // The two that every directory has take the first places.
        let own = self.tree.attr(dir)?;
        for (place, name) in [(1, &b"."[..]), (2, b"..")] {
            let type_ = kind_of(libc::S_IFDIR);
            if offset < place && add(&own, DirEntry { ino: dir, offset: place, type_, name })? == 0
            {
                return Ok(());
            }
        }
        let mut from = offset.saturating_sub(2);
        loop {
            let batch: Vec<_> = {
                let layer = self.tree.layer();
                let listed = self.tree.list(&layer, dir, from, LISTED);
                let with = |l: super::tree::Listed| Ok((self.tree.attr_in(&layer, l.ino)?, l));
                listed.into_iter().map(with).collect::<io::Result<_>>()?
            };
            let Some((_, last)) = batch.last() else { return Ok(()) };
            from = last.next;
            for (attr, listed) in &batch {
                let type_ = kind_of(self.stat(listed.ino, attr).st_mode);
                let (ino, offset) = (listed.ino, listed.next + 2);
                if add(attr, DirEntry { ino, offset, type_, name: &listed.name })? == 0 {
                    return Ok(());
                }
            }
        }
    }
}
