//! CD-ROMs of archives that nodes unpack at their first start, in the order of their names.

use std::io::BufWriter;
use std::path::Path;

use lodge_formats::iso9660;

use super::archive::Layer;

/// Writes a CD-ROM, whole or not at all; the names of its files.
pub fn write(path: &Path, label: &str, layers: &[Layer]) -> Result<Vec<String>, String> {
    let text = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    // As many digits as keep the order.
    let digits = layers.len().saturating_sub(1).to_string().len().max(2);
    let (mut files, mut names) = (Vec::new(), Vec::new());
    for (n, layer) in layers.iter().enumerate() {
        let size = u32::try_from(layer.bytes)
            .map_err(|_| format!("{} is too large for a CD-ROM", layer.name))?;
        let name = format!("{n:0digits$}{}.tar", layer.name);
        names.push(name.clone());
        files.push(iso9660::File { name, mode: 0o644, size, contents: layer.stream() });
    }
    let dir = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(dir).map_err(|e| text(&e))?;
    let part = tempfile::Builder::new().prefix(".cdrom-").tempfile_in(dir);
    let part = part.map_err(|e| text(&e))?;
    iso9660::write(BufWriter::new(part.as_file()), label, files).map_err(|e| text(&e))?;
    part.persist(path).map_err(|e| text(&e))?;
    Ok(names)
}
