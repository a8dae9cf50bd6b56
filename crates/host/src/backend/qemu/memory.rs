//! QEMU's memory in a file or on its way to another host: written by one process, read by the next.
//! QEMU is handed the file or the connection; its jail has none of it.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use serde_json::{Value, json};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;

use super::control::Control;
use super::qmp::{Qmp, QmpError, QmpEvent};

/// Bytes a second: as fast as the disk.
const NO_LIMIT: u64 = 1 << 50;
/// The name under which QEMU keeps the file.
const FILE: &str = "memory";
/// The event that tells how far it has come.
const PROGRESS: &str = "MIGRATION";

impl Control {
    /// Stops the guest and writes its memory to a file.
    pub async fn save(&self, file: &File) -> Result<(), String> {
        let saved = self.write(file).await;
        if saved.is_err() {
            // Whatever is still under way is of no use.
            self.stop_sending().await;
        }
        saved
    }

    async fn write(&self, file: &File) -> Result<(), String> {
        let stopped = self.qmp().ask("stop", Value::Null).await;
        stopped.map_err(|e| e.to_string())?;
        self.migrate(file.as_fd(), false).await
    }

    /// Sends the memory of a guest that runs on meanwhile, and stands still at the end.
    pub async fn send(&self, to: BorrowedFd<'_>) -> Result<(), String> {
        self.migrate(to, true).await
    }

    /// Gives up what is being sent; a guest that ran goes on.
    pub async fn stop_sending(&self) {
        // It may just have ended by itself.
        let _ = self.qmp().ask("migrate_cancel", Value::Null).await;
    }

    async fn migrate(&self, to: BorrowedFd<'_>, runs: bool) -> Result<(), String> {
        let text = |e: QmpError| e.to_string();
        let (qmp, mut events) = (self.qmp(), self.events());
        prepare(qmp, to).await.map_err(text)?;
        // A guest that writes faster than can be sent is slowed down.
        let slow = json!({"capabilities": [{"capability": "auto-converge", "state": runs}]});
        qmp.ask("migrate-set-capabilities", slow).await.map_err(text)?;
        let fast = json!({"max-bandwidth": NO_LIMIT});
        qmp.ask("migrate-set-parameters", fast).await.map_err(text)?;
        qmp.ask("migrate", json!({"uri": format!("fd:{FILE}")})).await.map_err(text)?;
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Ok(event) if event.name != PROGRESS => continue,
                    // It is asked below.
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return Err(text(QmpError::Gone)),
                },
                () = qmp.gone() => return Err(text(QmpError::Gone)),
            }
            let told = qmp.ask("query-migrate", Value::Null).await.map_err(text)?;
            match told["status"].as_str().unwrap_or_default() {
                "completed" => return Ok(()),
                "failed" | "cancelled" => {
                    let why = told["error-desc"].as_str().unwrap_or("QEMU does not say why");
                    return Err(format!("its memory could not be written: {why}"));
                }
                _ => {}
            }
        }
    }

    /// Reads the memory of a guest that has not begun to run. QEMU ends where it does not fit.
    pub async fn load(
        &self,
        file: &File,
        events: &mut mpsc::UnboundedReceiver<QmpEvent>,
    ) -> Result<(), QmpError> {
        let qmp = self.qmp();
        prepare(qmp, file.as_fd()).await?;
        qmp.ask("migrate-incoming", json!({"uri": format!("fd:{FILE}")})).await?;
        while let Some(event) = events.recv().await {
            if event.name == PROGRESS && event.data["status"] == json!("completed") {
                return Ok(());
            }
        }
        Err(QmpError::Gone)
    }
}

/// Hands the file over, and asks to be told how it goes.
async fn prepare(qmp: &Qmp, file: BorrowedFd<'_>) -> Result<(), QmpError> {
    let told = json!({"capabilities": [{"capability": "events", "state": true}]});
    qmp.ask("migrate-set-capabilities", told).await?;
    qmp.ask_with_fd("getfd", json!({"fdname": FILE}), file).await.map(drop)
}
