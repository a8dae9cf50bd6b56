//! The second serial port: hears the guest's questions about its metadata and answers them, one
//! after the other, whatever becomes of the daemon. Holds no more than one question.

use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use lodge_formats::mdata::{Heard, hear, say};
use lodge_machine::host::Wrote;
use lodge_spec::draft::MdataDraft;
use lodge_spec::extras::Mdata;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::message::Tell;
use super::serve::{Shared, to_async};
use crate::mdata::answer;

/// A value of the largest size, in base64 twice over.
const MAX_LINE: usize = 2 << 20;
/// Writing takes a transaction of the daemon; a guest does it no faster than this.
const WRITE_PACE: Duration = Duration::from_millis(20);

/// Takes over what the daemon has written down; what the guest wrote before is in it.
pub(super) fn read(shared: &Shared, file: &Path) {
    let text = std::fs::read(file).unwrap_or_default();
    // Written as a whole by our own daemon; one that cannot be read changes nothing.
    let Ok(draft) = serde_json::from_slice::<MdataDraft>(&text) else { return };
    let MdataDraft { object, customer, internal, namespaces } = draft;
    *shared.mdata.borrow_mut() = Mdata {
        object: object.unwrap_or_default(),
        customer: customer.unwrap_or_default(),
        internal: internal.unwrap_or_default(),
        namespaces: namespaces.unwrap_or_default(),
    };
    shared.status.borrow_mut().wrote.clear();
}

pub(super) async fn serve(shared: Rc<Shared>, serial: StdStream) {
    let Ok(serial) = to_async(serial) else { return };
    let (mut from_guest, mut to_guest) = serial.into_split();
    let (mut buffer, mut line, mut too_long) = (vec![0; 4096], Vec::new(), false);
    while let Ok(count @ 1..) = from_guest.read(&mut buffer).await {
        for byte in &buffer[..count] {
            match byte {
                b'\n' => {
                    let whole = std::mem::take(&mut line);
                    // What is too long is damaged, and damaged lines have no answer.
                    if std::mem::take(&mut too_long) {
                        continue;
                    }
                    let (said, wrote) = judge(&shared, &whole);
                    if let Some(wrote) = wrote {
                        keep(&shared, wrote);
                        tokio::time::sleep(WRITE_PACE).await;
                    }
                    if to_guest.write_all(&said).await.is_err() {
                        return;
                    }
                }
                b'\r' => {}
                byte if line.len() < MAX_LINE => line.push(*byte),
                _ => (line, too_long) = (Vec::new(), true),
            }
        }
    }
}

fn judge(shared: &Shared, line: &[u8]) -> (Vec<u8>, Option<Wrote>) {
    match hear(line) {
        Heard::Nothing => (Vec::new(), None),
        Heard::Say(words) => (format!("{words}\n").into_bytes(), None),
        Heard::Ask(form, ask) => {
            let (answer, wrote) = answer(&mut shared.mdata.borrow_mut(), ask);
            (say(&form, &answer), wrote)
        }
    }
}

/// Tells the daemon, and whichever daemon comes next.
fn keep(shared: &Shared, wrote: Wrote) {
    let mut status = shared.status.borrow_mut();
    status.wrote.retain(|w| (w.internal, &w.key) != (wrote.internal, &wrote.key));
    status.wrote.push(wrote.clone());
    drop(status);
    shared.tell(Tell::Wrote { wrote });
}
