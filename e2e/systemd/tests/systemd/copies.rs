//! Copies of the template under another name, made with `make new`; `make dev`, `make update` and `make uninstall`; and
//! the consistency of the documents.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::Signal;
use testkit::client::{Connection, Target, get};
use testkit::process::{Process, make, without_cargo};

use crate::{FOLDER, NAME, app_binary};

const NEW_NAME: &str = "shop-front";
/// How long a test waits for cargo to compile one crate. It is long because other tests may compile at the same time.
const COMPILED: Duration = Duration::from_secs(900);

fn run(command: &mut Command) -> String {
    let output = command.output().expect("the command runs");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{command:?}: {text}");
    text
}

/// `example` is the name of one, or empty.
fn copy(to: &Path, example: &str) {
    let arguments =
        [format!("NAME={NEW_NAME}"), format!("DIR={}", to.display()), format!("EXAMPLE={example}")];
    run(make(FOLDER, &["new"]).args(arguments));
}

/// A copy that will be compiled. It is always in the same folder, so that cargo compiles only what has changed since
/// the last run. The lock admits one test at a time, because two cargos would wait for each other's lock on the target
/// folder while the time limits of the tests run.
fn copy_to_compile(example: &str) -> (PathBuf, MutexGuard<'static, ()>) {
    static COPY: Mutex<()> = Mutex::new(());
    let alone = COPY.lock().unwrap_or_else(PoisonError::into_inner);
    let copied = Path::new(env!("CARGO_TARGET_TMPDIR")).join("copy");
    let _ = std::fs::remove_dir_all(&copied);
    copy(&copied, example);
    // The copied sources have the old times of this repository, but the last test that compiled them may have changed
    // them. Without new times cargo would take its stale output for current.
    run(Command::new("sh").args(["-c", "touch src/*.rs tests/*.rs"]).current_dir(&copied));
    (copied, alone)
}

#[test]
fn copy_is_small_and_does_not_contain_the_old_name() {
    let folder = tempfile::tempdir().expect("the folder is created");
    let copied = folder.path().join("copy");
    copy(&copied, "");
    // `app.rs` and `app::` are a file of the service, not the package.
    let words = format!(r"\b{NAME}\b(?!\.rs|::|;)|\b{}_", NAME.to_uppercase().replace('-', "_"));
    let mut grep = Command::new("grep");
    let found = grep
        .args(["-rnP", "--exclude-dir=outlive", "--exclude-dir=.git", &words, "."])
        .current_dir(&copied)
        .output();
    assert_eq!(String::from_utf8_lossy(&found.expect("grep runs").stdout), "");
    for kind in ["service", "socket"] {
        assert!(copied.join(format!("systemd/{NEW_NAME}.{kind}")).exists());
        assert!(!copied.join(format!("systemd/{NAME}.{kind}")).exists());
    }
    let mut lines = Command::new("sh");
    lines.args(["-c", "git ls-files ':!outlive' ':!Cargo.lock' | xargs cat | wc -l"]);
    let lines: u32 = run(lines.current_dir(&copied)).trim().parse().expect("the value is a number");
    assert!(lines < 700, "{lines} lines");
}

/// The path of each file that git tracks in `folder`, with its content.
fn tracked(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let files = run(Command::new("git").args(["ls-files"]).current_dir(folder));
    let read = |file: &str| (file.to_owned(), std::fs::read(folder.join(file)).expect(file));
    files.lines().map(read).collect()
}

/// GitHub's "Use this template" copies the whole repository, so the service is made in this copy.
#[test]
fn make_new_in_place_gives_the_same_files_as_a_copy() {
    for example in ["EXAMPLE=", "EXAMPLE=board"] {
        let folder = tempfile::tempdir().expect("the folder is created");
        let source = source_repository(folder.path());
        let copied = folder.path().join("copy");
        let name = format!("NAME={NEW_NAME}");
        run(&mut make(&source, &["new", &name, &format!("DIR={}", copied.display()), example]));
        let before = run(Command::new("git").args(["rev-parse", "HEAD"]).current_dir(&source));
        std::fs::write(source.join("deny.toml"), "mine").expect("the file is written");
        let refusal = refused(make(&source, &["new", &name, "DIR=.", example]));
        assert!(refusal.contains("There are uncommitted changes"), "{refusal}");
        run(Command::new("git").args(["checkout", "--quiet", "deny.toml"]).current_dir(&source));
        run(&mut make(&source, &["new", &name, "DIR=.", example]));
        assert!(tracked(&source) == tracked(&copied), "the files differ");
        let git = |arguments: &[&str]| run(Command::new("git").args(arguments).current_dir(&source));
        assert_eq!(git(&["status", "--porcelain"]), "");
        assert_eq!(git(&["rev-parse", "HEAD~"]), before, "the history is kept");
    }
}

#[test]
fn code_in_documents_is_taken_from_examples() {
    let read = |path: &str| std::fs::read_to_string(Path::new(FOLDER).join(path)).expect(path);
    for (document, example) in [
        ("README.md", "outlive/examples/minimal.rs"),
        ("docs/recipes/application.md", "e2e/links/src/app.rs"),
        ("docs/recipes/commands.md", "outlive/examples/shop.rs"),
        ("docs/recipes/configure.md", "outlive/examples/shop.rs"),
        ("docs/recipes/long-lived.md", "outlive/examples/chat.rs"),
        ("docs/recipes/sockets.md", "outlive/examples/ingest.rs"),
        ("docs/recipes/tls.md", "outlive/examples/who.rs"),
        ("docs/recipes/traces.md", "outlive/examples/traced.rs"),
        ("docs/recipes/middleware.md", "e2e/middleware/src/main.rs"),
    ] {
        let text = read(document);
        // The document leaves out the name of the example, so that clap uses that of the package.
        let code = read(example).replace("name = \"minimal\", ", "");
        let mut blocks = text.split("```rust\n").skip(1).map(|rest| rest.split("```").next().unwrap_or(rest));
        let first = blocks.next().unwrap_or_else(|| panic!("{document} has no block of Rust"));
        assert!(code.contains(first), "not in {example}: {first}");
        if document == "docs/recipes/sockets.md" {
            blocks.for_each(|block| assert!(code.contains(block), "not in {example}: {block}"));
        }
    }
}

/// Links to another website begin with a scheme, and those to a heading with `#`.
#[test]
fn each_link_between_documents_leads_to_a_file() {
    let list = ["ls-files", "*.md", ":!e2e", ":!outlive/src", ":!outlive/template-README.md"];
    let documents = run(Command::new("git").args(list).current_dir(FOLDER));
    let mut links = 0;
    for document in documents.lines() {
        let path = Path::new(FOLDER).join(document);
        let text = std::fs::read_to_string(&path).expect(document);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next()) {
            if !link.is_empty() && !link.contains(':') {
                links += 1;
                assert!(path.with_file_name(link).exists(), "{document}: {link}");
            }
        }
    }
    assert!(links > 60, "only {links} links were found");
}

/// The website of `make docs` has the recipes of this list.
#[test]
fn each_recipe_is_in_the_list_of_recipes() {
    let folder = Path::new(FOLDER).join("docs/recipes");
    let list = std::fs::read_to_string(folder.join("README.md")).expect("the list is readable");
    for entry in std::fs::read_dir(&folder).expect("the folder is readable") {
        let name = entry.expect("the entry is readable").file_name().into_string().expect("the name is text");
        if Path::new(&name).extension().is_some_and(|end| end == "md") && name != "README.md" {
            let is_listed = |line: &str| line.starts_with('[') && line.contains(&format!("]({name})"));
            assert!(list.lines().any(is_listed), "{name} is not in docs/recipes/README.md");
        }
    }
}

#[test]
fn each_test_named_in_security_md_exists() {
    fn sources(path: &Path) -> String {
        if path.is_dir() {
            let entries = std::fs::read_dir(path).expect("the folder is readable");
            entries.map(|entry| sources(&entry.expect("the entry is readable").path())).collect()
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            std::fs::read_to_string(path).expect("the file is readable")
        } else {
            String::new()
        }
    }
    let folders = ["e2e/process/tests", "e2e/systemd/tests", "outlive/src"];
    let sources: String = folders.iter().map(|folder| sources(&Path::new(FOLDER).join(folder))).collect();
    let text =
        std::fs::read_to_string(Path::new(FOLDER).join("outlive/SECURITY.md")).expect("the file is readable");
    let is_test = |word: &&str| {
        word.matches('_').count() > 2
            && word.chars().all(|c| c.is_ascii_lowercase() || "_0123456789".contains(c))
    };
    let named: Vec<_> = text.split('`').filter(is_test).collect();
    assert!(named.len() > 15, "{named:?}");
    for name in named {
        assert!(sources.contains(&format!("fn {name}(")), "{name}");
    }
}

/// A command in a copy that uses the target folder of this repository, so that compiled dependencies are reused.
fn in_copy(copied: &Path, command: &[&str]) -> Command {
    let mut run = Command::new(command[0]);
    run.args(&command[1..]).current_dir(copied);
    without_cargo(&mut run);
    run.env("CARGO_TARGET_DIR", Path::new(FOLDER).join("target")).env("CARGO_NET_OFFLINE", "true");
    run
}

#[test]
fn copy_passes_test_and_check_before_and_after_make_update() {
    let (copied, _alone) = copy_to_compile("");
    let make = |goal: &[&str]| run(&mut in_copy(&copied, &[&["make", "--silent"], goal].concat()));
    let sh = |script: &str| run(&mut in_copy(&copied, &["sh", "-ec", script]));
    let tested = make(&["test"]);
    assert!(tested.contains("a_connection_outlives_a_reload ... ok"), "{tested}");
    make(&["check"]);
    // The copy now differs from the template: another route, another line in a unit.
    sh(
        "sed -i 's:\\(.*\\)\\.route(\"/echo\", any(echo)):\\1.route(\"/mine\", any(echo)):; s:\"/echo\":\"/mine\":' src/app.rs",
    );
    sh(&format!("sed -i 's/^WatchdogSec=.*/WatchdogSec=20s/' systemd/{NEW_NAME}.service"));
    sh("git -c user.name=x -c user.email=x commit --quiet --all --message=mine");
    // An older library that does not compile, so that the tests pass only with the updated one.
    sh("echo '# Changes' >outlive/CHANGELOG.md && echo 'compile_error!(\"old\");' >>outlive/src/lib.rs");
    sh("git -c user.name=x -c user.email=x commit --quiet --all --message=old");
    let text = make(&["update", &format!("FROM={FOLDER}")]);
    assert!(text.contains("## 0.2.0"), "the changes are not printed: {text}");
    assert!(
        text.contains("-WatchdogSec=20s") && text.contains("+WatchdogSec=10s"),
        "the differences are not printed: {text}"
    );
    let differs = |line: &str| line.starts_with(['-', '+']) && line.contains("SHOP_FRONT_");
    assert!(!text.lines().any(differs), "the prefix of the variables is printed as a difference: {text}");
    assert!(text.contains("a_connection_outlives_a_reload ... ok"), "{text}");
    let changed = sh("git status --porcelain | grep -v ' outlive/' || :");
    assert_eq!(changed, "", "make update changed files outside outlive/");
}

/// `make test` would also run the tests of the library, which the test above does.
#[test]
fn copy_of_the_board_passes_its_tests_and_check_and_runs_on_a_systemd() {
    let (copied, _alone) = copy_to_compile("board");
    let tested = run(&mut in_copy(&copied, &["cargo", "test", "--workspace", "--bins", "--test", "service"]));
    for test in ["events_begin_after_the_last_event_id", "a_connection_outlives_a_reload"] {
        assert!(tested.contains(&format!("{test} ... ok")), "{tested}");
    }
    let tested = run(&mut in_copy(&copied, &["make", "--silent", "check", "test-systemd"]));
    assert!(tested.contains("restarts_and_reloads_lose_no_request_and_no_connection ... ok"), "{tested}");
    for unused in ["humantime", "e2e", "APP_", "/live", "board.service"] {
        let mut grep = Command::new("grep");
        let found = grep
            .args(["-r", unused, "src", "systemd", "README.md", "Cargo.toml"])
            .current_dir(&copied)
            .output();
        assert_eq!(String::from_utf8_lossy(&found.expect("grep runs").stdout), "");
    }
}

#[test]
fn make_dev_reloads_after_a_change_and_keeps_connections() {
    let (copied, _alone) = copy_to_compile("");
    let address = testkit::free_address();
    // Before any time limit of this test, because the first build may take long.
    run(&mut in_copy(&copied, &["cargo", "build"]));
    let mut make = make(&copied, &["dev", &format!("DEV={address}")]);
    make.env("CARGO_TARGET_DIR", Path::new(FOLDER).join("target"));
    let log = tempfile::NamedTempFile::new().expect("the file is created");
    make.stderr(log.reopen().expect("the file is created"));
    let mut make = Process::spawn(&mut make).expect("make dev starts");
    let log = || std::fs::read_to_string(log.path()).expect("the file is readable");
    let target = Target::Tcp(address);
    let mut kept = None;
    testkit::wait_until_within(COMPILED, "the service starts", || {
        kept = testkit::block_on(Connection::open(&target)).ok();
        kept.is_some()
    });
    drop(kept);
    // The connection belongs to this runtime, so all requests have to be sent on it.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("the runtime is built");
    let mut kept = runtime.block_on(Connection::open(&target)).expect("the service listens");
    let mut answer = || {
        let answer = runtime.block_on(kept.ask(&get("/"))).expect("the connection is still open");
        assert!(!answer.closes(), "the server closes the connection");
        answer.text()
    };
    assert!(answer().starts_with("pid "));
    let routes = copied.join("src/app.rs");
    let source = std::fs::read_to_string(&routes).expect("the file is readable");
    let write = |to: &str| {
        testkit::wait_until("the sources are watched", || is_watched(&make));
        std::fs::write(&routes, source.replace("pid {pid}", to)).expect("the file is written");
    };
    // After a build that fails, the old process keeps serving.
    write("PID {pid");
    testkit::wait_until_within(COMPILED, "the compiler refuses the change", || {
        assert!(answer().starts_with("pid "));
        log().contains("error: could not compile")
    });
    assert!(answer().starts_with("pid "));
    // After a build that succeeds, the new process takes over with the connection.
    write("PID {pid}");
    let mut changed = String::new();
    testkit::wait_until_within(COMPILED, "the change is served", || {
        changed = answer();
        changed.starts_with("PID ")
    });
    assert!(changed.contains("generation 2,"), "the process was not replaced by one reload: {changed}");
    // SIGTERM to `make dev` ends the service too.
    make.signal(Signal::TERM);
    assert!(!make.wait().expect("the process ends").success());
    testkit::wait_until("the port is closed", || std::net::TcpStream::connect(address).is_err());
}

/// Whether an `inotifywait` below `make dev` watches both the sources and Cargo.toml. A change before that would be
/// missed.
fn is_watched(make: &Process) -> bool {
    let group = make.pid().as_raw_nonzero().to_string();
    let processes =
        std::fs::read_dir("/proc").expect("the folder is readable").flatten().map(|entry| entry.path());
    processes.into_iter().any(|process| {
        // A process may exit while its files are read.
        let stat = std::fs::read_to_string(process.join("stat")).unwrap_or_default();
        let of_group =
            stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(2)) == Some(&*group);
        let fds = || std::fs::read_dir(process.join("fdinfo")).into_iter().flatten().flatten();
        of_group
            && stat.contains("(inotifywait)")
            && fds().any(|fd| {
                let info = std::fs::read_to_string(fd.path()).unwrap_or_default();
                info.matches("inotify wd:").count() >= 2
            })
    })
}

/// The output of a command that has to fail.
fn refused(mut command: Command) -> String {
    let output = command.output().expect("the command runs");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(!output.status.success(), "{command:?}: {text}");
    text
}

#[test]
fn invalid_name_or_folder_is_refused_by_make_new_before_a_folder_is_made() {
    let parent = tempfile::tempdir().expect("the folder is created");
    let new = parent.path().join("new").display().to_string();
    let invalid = ["", "Shop", "1shop", "a b", "shop-", "outlive", "packaging", "testkit"];
    for (name, folder) in
        invalid.map(|name| (name, &*new)).into_iter().chain([("shop", ""), ("shop", "/tmp")])
    {
        refused(make(FOLDER, &["new", &format!("NAME={name}"), &format!("DIR={folder}")]));
        assert!(!Path::new(&new).exists(), "NAME={name} DIR={folder}");
    }
}

#[test]
fn unknown_example_is_refused_by_make_new_with_the_names_of_the_examples() {
    let parent = tempfile::tempdir().expect("the folder is created");
    let new = parent.path().join("new");
    for example in ["boar", "links", ".*", "board links"] {
        let folder = format!("DIR={}", new.display());
        let refusal = refused(make(FOLDER, &["new", "NAME=shop", &folder, &format!("EXAMPLE={example}")]));
        assert!(
            refusal.contains(&format!("EXAMPLE={example} is wrong: the examples are board, ")),
            "{refusal}"
        );
        assert!(!new.exists());
    }
}

#[test]
fn make_new_that_fails_leaves_no_folder() {
    let parent = tempfile::tempdir().expect("the folder is created");
    let new = parent.path().join("new");
    let cargo = parent.path().join("bin/cargo");
    std::fs::create_dir(cargo.parent().expect("it has a folder")).expect("the folder is created");
    run(Command::new("ln").args(["-s", "/bin/false"]).arg(&cargo));
    let mut make = make(FOLDER, &["new", "NAME=shop", &format!("DIR={}", new.display())]);
    let path = std::env::var("PATH").expect("the variable is set");
    make.env("PATH", format!("{}:{path}", parent.path().join("bin").display()));
    refused(make);
    assert!(!new.exists());
}

/// Another repository in `parent` with the files of this one, because other tests would see changes of this one.
fn source_repository(parent: &Path) -> PathBuf {
    let source = parent.join("source");
    std::fs::create_dir(&source).expect("the folder is created");
    let script = "git ls-files -z ':!e2e/fuzz' | tar --create --null --files-from=- | tar --extract --directory=\"$1\" \
                  && cd \"$1\" && git init --quiet && git add --force . \
                  && git -c user.name=x -c user.email=x commit --quiet --no-verify --message=source";
    run(Command::new("sh").args(["-ec", script, "sh"]).arg(&source).current_dir(FOLDER));
    source
}

#[test]
fn make_new_makes_a_repository_of_the_tracked_files_with_one_commit() {
    let folder = tempfile::tempdir().expect("the folder is created");
    let source = source_repository(folder.path());
    std::fs::write(source.join("untracked"), "").expect("the file is written");
    let copied = folder.path().join("copy");
    let mut new = make(&source, &["new", "NAME=shop", &format!("DIR={}", copied.display())]);
    // Without a configured author.
    for (name, value) in [("GIT_CONFIG_GLOBAL", "/dev/null"), ("GIT_CONFIG_NOSYSTEM", "1")] {
        new.env(name, value);
    }
    for name in ["AUTHOR_NAME", "AUTHOR_EMAIL", "COMMITTER_NAME", "COMMITTER_EMAIL"] {
        new.env_remove(format!("GIT_{name}"));
    }
    run(&mut new);
    assert!(!copied.join("untracked").exists());
    let git = |arguments: &[&str]| run(Command::new("git").args(arguments).current_dir(&copied));
    assert_eq!(git(&["status", "--porcelain"]), "");
    assert_eq!(git(&["log", "--format=%s"]), "Start from the template of outlive\n");
    let configured = git(&["config", "--local", "--list"]);
    assert!(!configured.contains("user."), "the author is kept for later commits: {configured}");
}

#[test]
fn make_update_of_a_library_that_is_not_committed_is_refused_and_changes_nothing() {
    let folder = tempfile::tempdir().expect("the folder is created");
    let copied = folder.path().join("copy");
    copy(&copied, "");
    let changed = copied.join("outlive/CHANGELOG.md");
    std::fs::write(&changed, "mine").expect("the file is written");
    let update = || {
        let text = refused(make(&copied, &["update", &format!("FROM={FOLDER}")]));
        assert_eq!(std::fs::read_to_string(&changed).expect("the file is readable"), "mine");
        text
    };
    assert!(update().contains("uncommitted changes in outlive/"));
    // Without a repository, git cannot tell.
    std::fs::remove_dir_all(copied.join(".git")).expect("the repository is removed");
    assert!(update().contains("git does not track outlive/"));
    // Ignored by a repository around it.
    run(Command::new("git").args(["init", "--quiet"]).current_dir(&folder));
    std::fs::write(folder.path().join(".gitignore"), "copy\n").expect("the file is written");
    assert!(update().contains("git does not track outlive/"));
}

#[test]
fn make_update_from_the_copy_itself_is_refused_and_changes_nothing() {
    let folder = tempfile::tempdir().expect("the folder is created");
    let copied = folder.path().join("copy");
    copy(&copied, "");
    std::os::unix::fs::symlink(&copied, folder.path().join("link")).expect("the link is made");
    for from in [".", "../copy", "../link"] {
        let text = refused(make(&copied, &["update", &format!("FROM={from}")]));
        assert!(text.contains("is the folder to update:"), "{text}");
        assert!(copied.join("outlive/Cargo.toml").exists(), "outlive/ was removed");
    }
}

#[test]
fn dbus_drop_in_is_installed_only_with_a_binary_that_owns_the_name() {
    for (binary, owns_name) in [(app_binary(), true), ("/bin/true", false)] {
        let folder = tempfile::tempdir().expect("the folder is created");
        let mut make = make(FOLDER, &["install", &format!("BINARY={binary}"), "SYSTEMD=257"]);
        run(make.arg(format!("DESTDIR={}", folder.path().display())));
        let drop_ins = run(Command::new("find").args([".", "-path", "*.d/*"]).current_dir(&folder));
        assert_eq!(drop_ins.contains("log-control.conf"), owns_name, "{binary}: {drop_ins}");
        assert!(drop_ins.contains("backoff.conf"), "{binary}: {drop_ins}");
    }
}

/// Cargo passes MAKEFLAGS, which contains DESTDIR, to the build script of jemalloc. The make of that script would then
/// install into DESTDIR.
#[test]
fn make_install_does_not_pass_its_variables_to_the_makefiles_of_dependencies() {
    let folder = tempfile::tempdir().expect("the folder is created");
    let root = folder.path().display();
    let cargo = format!(
        "#!/bin/sh\nprintf '%s' \"$MAKEFLAGS\" >{root}/flags\nmkdir -p {root}/target/release\ntouch {root}/target/release/{NAME}\n"
    );
    std::fs::create_dir(folder.path().join("bin")).expect("the folder is created");
    std::fs::write(folder.path().join("bin/cargo"), cargo).expect("the file is written");
    run(Command::new("chmod").args(["+x", "bin/cargo"]).current_dir(&folder));
    let path = std::env::var("PATH").expect("PATH is set");
    let mut make =
        make(FOLDER, &["install", &format!("TARGET={root}/target"), &format!("DESTDIR={root}/root")]);
    run(make.env("PATH", format!("{root}/bin:{path}")));
    let flags = std::fs::read_to_string(folder.path().join("flags")).expect("cargo was called");
    assert!(!flags.contains("DESTDIR"), "{flags}");
}

#[test]
fn uninstall_removes_each_installed_file() {
    let folder = tempfile::tempdir().expect("the folder is created");
    let make = |goal: &str| {
        let mut make = make(FOLDER, &[goal, "PREFIX=/usr"]);
        make.arg(format!("DESTDIR={}", folder.path().display()));
        run(make.arg(format!("BINARY={}", app_binary())));
        let mut find = Command::new("find");
        run(find.args([".", "-type", "f"]).current_dir(folder.path()))
    };
    let installed = make("install");
    for file in ["usr/bin/NAME", "usr/lib/systemd/system/NAME.service", "usr/lib/systemd/system/NAME.socket"]
    {
        assert!(installed.contains(&file.replace("NAME", NAME)), "{installed}");
    }
    assert_eq!(make("uninstall"), "");
}
