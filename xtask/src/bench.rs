//! Placeholder header
pub(crate) fn bench() -> anyhow::Result<()> {
    anyhow::bail!("not yet")
}
