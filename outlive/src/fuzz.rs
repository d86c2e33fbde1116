//! Fuzz targets: tests that bolero feeds with the corpus in `e2e/fuzz/corpus/NAME` and with random input; `make fuzz`
//! runs the same tests under libFuzzer.
//!
//! bolero looks for the corpus of a test only in `__fuzz__/NAME/corpus` beside its source file. Hundreds of corpus files
//! would then be among the sources, in folders that change their names with each test and module. So bolero is given the
//! test binary in place of the source file, and finds a link to the corpus beside it.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Where the corpora are. A copy of the template has none, so only random input is used there.
const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../e2e/fuzz/corpus");

/// As `bolero::check!()`, with the corpus of this name.
macro_rules! target {
    ($name:literal) => {{
        let location = bolero::TargetLocation {
            package_name: env!("CARGO_PKG_NAME"),
            manifest_dir: env!("CARGO_MANIFEST_DIR"),
            module_path: module_path!(),
            file: crate::fuzz::file_beside_corpus($name),
            line: line!(),
            item_path: bolero::__item_path__!(),
            test_name: Some($name.to_owned()),
        };
        // `make fuzz` lists the targets this way.
        if !location.should_run() {
            return;
        }
        bolero::test(location)
    }};
}
pub(crate) use target;

/// The path of the test binary, after the link to the corpus has been made beside it.
pub fn file_beside_corpus(name: &str) -> &'static str {
    let binary = std::env::current_exe().expect("the test binary has a path");
    let link: PathBuf = binary.with_file_name("__fuzz__").join(name).join("corpus");
    std::fs::create_dir_all(link.parent().expect("it has a parent")).expect("the build folder is writable");
    match std::os::unix::fs::symlink(Path::new(CORPUS).join(name), &link) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => panic!("{}: {error}", link.display()),
        _ => {}
    }
    // bolero wants a path that lives as long as the process, and each target asks for it once.
    Box::leak(binary.into_os_string().into_string().expect("the path is UTF-8").into_boxed_str())
}
