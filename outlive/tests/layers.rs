//! The folders of the library form layers: a file may import only from its own folder and from folders below it.
//! Without this rule a change in a low folder could need a change in a high one, and no folder could be read by itself.

use std::path::Path;

/// The folders of `src`, from the highest to the lowest.
const LAYERS: [&str; 12] = [
    "lifecycle",
    "takeover",
    "server",
    "listeners",
    "handover",
    "connection",
    "requests",
    "app",
    "observe",
    "registry",
    "transport",
    "os",
];

fn layer(folder: &str) -> usize {
    LAYERS.iter().position(|layer| *layer == folder).unwrap_or_else(|| panic!("{folder} is in no layer"))
}

/// The Rust files in `folder` and below it.
fn sources(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder)
        .expect("the folder can be read")
        .map(|entry| entry.expect("the entry can be read").path());
    entries
        .flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] })
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect()
}

/// Whether a file contains only tests, which may import from every folder.
fn is_test_file(path: &Path) -> bool {
    let stem = path.file_stem().expect("the file has a name").to_string_lossy();
    stem == "tests" || stem == "models" || stem.ends_with("_tests")
}

#[test]
fn folders_import_only_from_folders_below_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = 0;
    for path in sources(&root) {
        let inside = path.strip_prefix(&root).expect("the file is in src");
        if inside.components().count() == 1 || is_test_file(inside) {
            continue;
        }
        let own = inside
            .components()
            .next()
            .expect("the path begins with a folder")
            .as_os_str()
            .to_string_lossy()
            .into_owned();
        let text = std::fs::read_to_string(&path).expect("valid UTF-8");
        // Test modules at the end of a file may import from every folder.
        let code = text.split("\nmod tests {").next().expect("split gives at least one part");
        let lines = code.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//"));
        for (number, line) in lines {
            for path in line.split("crate::").skip(1) {
                let named: String =
                    path.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
                if named.is_empty() {
                    continue;
                }
                paths += 1;
                assert!(
                    layer(&named) >= layer(&own),
                    "{}:{}: {own} must not import from {named}, which is a higher layer",
                    inside.display(),
                    number + 1
                );
            }
        }
    }
    assert!(paths > 200, "found only {paths} paths, so this test does not find the imports");
}
