//! The description of the machine (ACPI). Its code is not run: what is wanted of it is looked for by
//! its bytes.

use crate::io::{Place, reach};

/// The code of the description; empty where there is none.
pub(crate) struct Tables {
    fixed: Option<Place>,
    code: Place,
    length: u64,
}

/// A register that the description names.
#[derive(Clone, Copy)]
pub(crate) struct Register {
    pub(crate) port: bool,
    pub(crate) address: u64,
}

impl Tables {
    /// `root` is where the hypervisor says that it begins, or 0.
    pub(crate) fn new(root: u64) -> Self {
        let fixed = (root != 0).then(|| fixed(root)).flatten();
        let code = fixed.and_then(code);
        let length = code.map_or(0, |code| code.plus(4).read_unaligned::<u32>().min(1 << 16));
        Self { fixed, code: code.unwrap_or(Place(0)), length: length.into() }
    }

    /// What ends the machine, where it is no board with the usual registers.
    pub(crate) fn sleep(&self) -> Option<Register> {
        let fixed = self.fixed.filter(|fixed| fixed.plus(4).read_unaligned::<u32>() >= 256)?;
        let [port, address] =
            [u64::from(fixed.plus(244).read::<u8>()), fixed.plus(248).read_unaligned()];
        (address != 0).then_some(Register { port: port == 1, address })
    }

    /// Every place where these bytes are.
    pub(crate) fn find<const N: usize>(&self, bytes: [u8; N]) -> impl Iterator<Item = Place> {
        let last = self.length.saturating_sub(N as u64 + 16);
        let places = (36..last).map(|at| self.code.plus(at));
        places.filter(move |place| place.read_unaligned::<[u8; N]>() == bytes)
    }
}

fn fixed(root: u64) -> Option<Place> {
    let root = reach(root);
    if root.read_unaligned::<[u8; 8]>() != *b"RSD PTR " {
        return None;
    }
    // From version 2 on the list is of numbers of 8 bytes.
    let wide = root.plus(15).read::<u8>() >= 2;
    let (list, size) = match wide {
        true => (reach(root.plus(24).read_unaligned()), 8),
        false => (reach(root.plus(16).read_unaligned::<u32>().into()), 4),
    };
    let entries = u64::from(list.plus(4).read_unaligned::<u32>().checked_sub(36)?) / size;
    (0..entries.min(64)).find_map(|entry| {
        let place = list.plus(36 + size * entry);
        let table = reach(match wide {
            true => place.read_unaligned(),
            false => place.read_unaligned::<u32>().into(),
        });
        (table.read_unaligned::<[u8; 4]>() == *b"FACP").then_some(table)
    })
}

fn code(fixed: Place) -> Option<Place> {
    let old = u64::from(fixed.plus(40).read_unaligned::<u32>());
    let length = fixed.plus(4).read_unaligned::<u32>();
    let new = if length >= 148 { fixed.plus(140).read_unaligned() } else { 0 };
    let code = if new != 0 { new } else { old };
    (code != 0).then(|| reach(code))
}
