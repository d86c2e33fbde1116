//! Tests of whole command lines: what has precedence, and where each value comes from.

use std::convert::Infallible;
use std::fs::{self, File};

use clap::{Args, Parser};
use tempfile::TempDir;

use super::origin::Origin;
use super::*;
use crate::app::secret::Secret;

#[derive(Debug, Parser)]
#[command(name = "precedence")]
struct Own {
    #[arg(long)]
    database: String,
    #[arg(long)]
    password: Secret,
    #[arg(long)]
    token: Option<Secret>,
    #[arg(long, hide_env_values = true)]
    key: Option<String>,
    #[arg(long)]
    verbose: bool,
    #[arg(long, short, action = clap::ArgAction::Count)]
    level: u8,
    #[arg(long)]
    tag: Vec<String>,
    #[arg(long, num_args = 2)]
    size: Option<Vec<u32>>,
}

#[derive(Debug, clap::Subcommand)]
enum OwnCommand {
    Migrate {
        #[arg(long)]
        dry_run: bool,
    },
}

/// A folder with a file for `--config` and a directory of credentials.
struct Files(TempDir);

impl Files {
    fn new(config: &str, credentials: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder is made");
        fs::write(folder.path().join("app.toml"), config).expect("the file is written");
        fs::create_dir(folder.path().join("credentials")).expect("the folder is made");
        for (name, content) in credentials {
            let path = folder.path().join("credentials").join(name);
            fs::write(path, content).expect("the file is written");
        }
        Self(folder)
    }

    fn credentials(&self) -> Credentials {
        let folder = File::open(self.0.path().join("credentials")).expect("the folder opens");
        Credentials::of_predecessor(folder.into())
    }

    /// Reads `line`, in which `FILE` is the path of the file.
    fn read(&self, line: &str) -> Result<(CommandLine<Own, OwnCommand>, Service<Own, OwnCommand>)> {
        let path = self.0.path().join("app.toml");
        let words =
            line.split(' ').map(|word| if word == "FILE" { path.clone().into() } else { word.into() });
        let input = Input::read(command_with::<Own, OwnCommand>(), words.collect())?;
        let line = CommandLine::of(input)?;
        let service = line.service(&self.credentials())?;
        Ok((line, service))
    }

    fn options(&self, line: &str) -> Service<Own, OwnCommand> {
        self.read(line).expect("the line is valid").1
    }

    fn error(&self, line: &str) -> String {
        let error = self.read(line).err().expect("the line is refused").to_string();
        error.replace(&format!("{}/", self.0.path().display()), "")
    }
}

impl Service<Own, OwnCommand> {
    /// The value of an option and where it comes from, as `check` shows them.
    fn shown(&self, name: &str) -> (&str, String) {
        let value = self.values.iter().find(|value| value.name == name).expect("the option exists");
        let origin = match &value.origin {
            Origin::File(path, line) => format!("{}:{line}", path.file_name().unwrap_or_default().display()),
            other => other.to_string(),
        };
        (value.value.as_deref().unwrap_or("-"), origin)
    }
}

#[test]
fn flag_replaces_a_value_of_the_file_and_the_file_a_default() {
    let files = Files::new("database = 'd'\npassword = 'p'\ndrain-timeout = '2s'\nlog = 'debug'\n", &[]);
    let (line, service) = files.read("x --config FILE --log info").expect("the line is valid");
    assert_eq!(line.config.drain_timeout.as_secs(), 2);
    assert_eq!(line.config.log.as_deref(), Some("info"));
    assert_eq!(service.options.database, "d");
    assert_eq!(service.shown("drain-timeout"), ("2s", "app.toml:3".into()));
    assert_eq!(service.shown("log"), ("info", "flag".into()));
    assert_eq!(service.shown("body-limit"), ("2MiB", "default".into()));
    assert_eq!(service.shown("tls-cert"), ("-", "default".into()));
}

#[test]
fn file_has_values_for_options_of_each_kind() {
    let config = "database = 'd'\npassword = 'p'\nverbose = true\nlevel = 2\ntag = ['a,b', 'c']\nsize = [1, 2]\n\
                  max-connections = 5_000\ntls-handover = false\n\
                  listen = ['127.0.0.1:80', 'admin=127.0.0.1:90']\n";
    let files = Files::new(config, &[]);
    let (line, service) = files.read("x --config FILE").expect("the line is valid");
    let own = &service.options;
    assert!(own.verbose && own.level == 2 && own.token.is_none());
    assert_eq!((&own.tag[..], own.size.as_deref()), (&["a,b".into(), "c".into()][..], Some(&[1, 2][..])));
    assert_eq!((line.config.max_connections, line.config.tls_handover), (5000, false));
    assert_eq!(line.config.listen.len(), 2);
    assert_eq!(service.shown("listen"), ("127.0.0.1:80,admin=127.0.0.1:90", "app.toml:9".into()));
    let service = files.options("x --config FILE --tag z --size 3 4 --listen 127.0.0.1:0,127.0.0.1:1");
    let own = &service.options;
    assert_eq!((&own.tag[..], own.size.as_deref()), (&["z".into()][..], Some(&[3, 4][..])));
    assert_eq!(service.shown("listen"), ("127.0.0.1:0,127.0.0.1:1", "flag".into()));
}

#[test]
fn flag_that_is_false_in_the_file_is_not_given() {
    let files = Files::new("database = 'd'\npassword = 'p'\nverbose = false\nlevel = 0\ntag = []\n", &[]);
    let service = files.options("x --config FILE");
    assert!(!service.options.verbose && service.options.level == 0 && service.options.tag.is_empty());
}

#[test]
fn options_that_require_each_other_may_stand_in_the_file_and_on_the_command_line() {
    let files = Files::new("database = 'd'\npassword = 'p'\ntls-key = 'k'\n", &[]);
    let (line, _) = files.read("x --config FILE --tls-cert c").expect("the line is valid");
    assert!(line.config.tls_cert.len() == 1 && line.config.tls_key.len() == 1);
    let error = files.error("x --config FILE");
    assert!(error.contains("--tls-cert <FILE>"), "{error}");
}

#[test]
fn secret_comes_from_flag_then_file_then_credential() {
    let credentials = [("password", "from credential\n"), ("token", "other")];
    let files = Files::new("database = 'd'\npassword = 'from file'\n", &credentials);
    let password = |line: &str| {
        let service = files.options(line);
        let (value, origin) = service.shown("password");
        assert_eq!(value, "[secret]");
        (service.options.password.expose().to_owned(), origin)
    };
    assert_eq!(password("x --config FILE --password f"), ("f".into(), "flag".into()));
    assert_eq!(password("x --config FILE"), ("from file".into(), "app.toml:2".into()));
    assert_eq!(password("x --database d"), ("from credential".into(), "credential".into()));
    let token = files.options("x --database d").options.token.expect("the unit has this credential");
    assert_eq!(token.expose(), "other");
}

#[test]
fn missing_secret_is_refused_unless_it_is_optional() {
    let files = Files::new("", &[("password", "p")]);
    assert!(files.options("x --database d").options.token.is_none());
    let files = Files::new("", &[]);
    let error = files.error("x --database d");
    assert!(
        error.contains("--password <PASSWORD>") && error.contains("LoadCredential=password:FILE"),
        "{error}"
    );
}

#[test]
fn secret_in_a_group_and_with_a_condition_comes_from_its_credential() {
    #[derive(Debug, Parser)]
    #[command(name = "precedence", group = clap::ArgGroup::new("login").required(true).args(["key", "token"]))]
    struct Grouped {
        #[arg(long)]
        key: Option<Secret>,
        #[arg(long)]
        token: Option<String>,
        #[arg(long, default_value = "no")]
        mode: String,
        #[arg(long, required_if_eq("mode", "no"))]
        password: Option<Secret>,
    }
    let files = Files::new("", &[("key", "k"), ("password", "p")]);
    let input = Input::read(command::<Grouped>(), vec!["x".into()]).expect("the line is valid");
    let line = CommandLine::<Grouped, Infallible>::of(input).expect("the secrets may come later");
    let service = line.service(&files.credentials()).expect("the credentials complete the line");
    assert_eq!(service.options.key.expect("it is set").expose(), "k");
    let error = line.service(&Credentials::default()).err().expect("the group is empty").to_string();
    assert!(error.contains("required"), "{error}");
}

#[test]
fn command_among_the_options_is_left_to_the_application() {
    #[derive(Debug, Parser)]
    #[command(name = "precedence")]
    struct Nested {
        #[command(subcommand)]
        command: Option<OwnCommand>,
    }
    let line = ["x", "migrate", "--dry-run"].map(OsString::from).to_vec();
    let input = Input::read(command::<Nested>(), line).expect("the line is valid");
    let line = CommandLine::<Nested, Infallible>::of(input).expect("the line is valid");
    let service = line.service(&Credentials::default()).expect("the line is valid");
    assert_eq!(line.action, Action::Serve);
    assert!(matches!(service.options.command, Some(OwnCommand::Migrate { dry_run: true })));
}

#[test]
fn secrets_are_in_no_value_that_check_shows() {
    let files =
        Files::new("database = 'd'\npassword = 'hunter1'\nkey = 'hunter2'\n", &[("token", "hunter3")]);
    let service = files.options("x --config FILE");
    let shown = table(&service.values);
    assert!(!shown.contains("hunter") && shown.matches("[secret]").count() == 3, "{shown}");
    assert!(!format!("{:?}", service.options).contains("hunter1"));
}

#[test]
fn help_shows_no_secret_and_names_the_credential() {
    let mut command = command_with::<Own, OwnCommand>();
    command = command.mut_arg("password", |arg| arg.env("PATH"));
    let path = std::env::var("PATH").expect("it is set");
    for help in [command.render_help().to_string(), command.render_long_help().to_string()] {
        assert!(!help.contains(&path) && help.contains("[credential: password]"), "{help}");
    }
}

#[test]
fn options_may_stand_before_and_after_a_command() {
    let files = Files::new("log = 'debug'\n", &[("password", "p")]);
    for line in [
        "x migrate --dry-run --database d --log info -l --tag a --tag b --size 1 2 --verbose",
        "x --database d --log info -l --tag a migrate --tag b --dry-run --size 1 2 --verbose",
        "x --database d --log info -l --tag a --tag b --size 1 2 --verbose migrate --dry-run",
    ] {
        let (read, service) = files.read(line).expect(line);
        assert!(matches!(service.command, Some(OwnCommand::Migrate { dry_run: true })), "{line}");
        let own = &service.options;
        assert_eq!((own.database.as_str(), own.level, own.verbose), ("d", 1, true), "{line}");
        assert_eq!(own.size.as_deref(), Some(&[1, 2][..]), "{line}");
        assert!(own.tag.len() == 2 && own.tag.contains(&"a".to_owned()), "{line}");
        assert_eq!((read.action, read.config.log.as_deref()), (Action::Own, Some("info")), "{line}");
        assert_eq!(service.shown("log"), ("info", "flag".into()));
    }
    for line in ["x check --config FILE --database d", "x --config FILE check --database d"] {
        let (read, _) = files.read(line).expect(line);
        assert_eq!((read.action, read.config.log.as_deref()), (Action::Check, Some("debug")), "{line}");
    }
}

#[test]
fn invalid_options_after_a_command_are_reported_as_those_before_it() {
    let files = Files::new("", &[("password", "p")]);
    let value =
        "invalid value 'soon' for '--drain-timeout <TIME>': expected a time such as 30s or 1m; see --help";
    for line in ["x --database d --drain-timeout soon migrate", "x --database d migrate --drain-timeout soon"]
    {
        assert_eq!(files.error(line), value);
    }
    let error = files.error("x migrate --drain-timeout 1s");
    assert!(error.contains("required") && error.contains("--database <DATABASE>"), "{error}");
    let error = files.error("x --database d migrate --drian-timeout 1s");
    assert!(error.contains("unexpected argument '--drian-timeout'"), "{error}");
    let error = files.error("x --database d migrato");
    assert!(error.contains("migrato") && error.contains("'migrate'"), "{error}");
}

#[test]
fn times_above_36500_days_are_refused_in_every_option() {
    let files = Files::new("", &[("password", "p")]);
    let command = Config::augment_args(clap::Command::new("x"));
    let options: Vec<_> = command
        .get_arguments()
        .filter(|option| option.get_value_names().is_some_and(|names| names == ["TIME"]))
        .filter_map(|option| option.get_long())
        .collect();
    assert!(options.contains(&"drain-timeout") && options.contains(&"idle-timeout"), "{options:?}");
    for option in options {
        files.read(&format!("x --database d --{option} 36500days")).expect(option);
        // The last one is more than humantime can express.
        for time in
            ["36501days", "18446744073709551615s", "18446744073709551616s", "18446744073709551615days"]
        {
            let error = files.error(&format!("x --database d --{option} {time}"));
            let expected = format!(
                "invalid value '{time}' for '--{option} <TIME>': expected a time of at most 36500days"
            );
            assert!(error.starts_with(&expected), "{error}");
        }
    }
}

#[test]
fn errors_name_the_file_the_line_and_the_key() {
    for (config, expected) in [
        (
            "log = 'info'\n\ndrian-timeout = '1s'\n",
            "app.toml:3: unknown key \"drian-timeout\": a similar option exists: \"drain-timeout\"",
        ),
        (
            "max_connections = 5\n",
            "app.toml:1: unknown key \"max_connections\": a similar option exists: \"max-connections\"",
        ),
        ("zzzz = 5\n", "app.toml:1: unknown key \"zzzz\": no option has this name; see --help"),
        ("help = true\n", "app.toml:1: unknown key \"help\": no option has this name; see --help"),
        ("config = 'x'\n", "app.toml:1: unknown key \"config\": no option has this name; see --help"),
        ("\"\" = 1\n", "app.toml:1: unknown key \"\": no option has this name; see --help"),
        (
            "[server]\nlog = 'info'\n",
            "app.toml:1: unknown table \"server\": expected all options outside tables",
        ),
        (
            "log = 'info'\ndrain-timeout = 'soon'\n",
            "app.toml:2: invalid value 'soon' for \"drain-timeout\": expected a time such as 30s or 1m",
        ),
        (
            "drain-timeout = 30\n",
            "app.toml:1: invalid value '30' for \"drain-timeout\": expected a time such as 30s or 1m",
        ),
        (
            "max-connections = 0\n",
            "app.toml:1: invalid value '0' for \"max-connections\": 0 is not in 1..=1000000",
        ),
        ("log = ['info']\n", "app.toml:1: invalid value for \"log\": expected one value, got an array"),
        (
            "\nlog = { a = 1 }\n",
            "app.toml:2: invalid value for \"log\": expected a string or a number, got a table",
        ),
        (
            "listen = [['127.0.0.1:1']]\n",
            "app.toml:1: invalid value for \"listen\": expected a string or a number, got an array",
        ),
        (
            "verbose = 'yes'\n",
            "app.toml:1: invalid value for \"verbose\": expected true or false, got a string",
        ),
        ("level = 'high'\n", "app.toml:1: invalid value for \"level\": expected a number, got a string"),
        ("level = 256\n", "app.toml:1: invalid value for \"level\": expected a number from 0 to 255"),
        ("size = [1]\n", "app.toml:1: invalid value for \"size\": expected 2 values, got 1"),
        ("size = 1\n", "app.toml:1: invalid value for \"size\": expected 2 values, got 1"),
        ("password = 1\n", "app.toml:1: invalid value for \"password\": expected a string, got a number"),
        ("log = \"a\\u0000\"\n", "app.toml:1: invalid value for \"log\": it contains a NUL character"),
        ("log = 'a'\nlog = 'b'\n", "app.toml:2: duplicate key \"log\""),
    ] {
        let files = Files::new(config, &[]);
        assert_eq!(files.error("x --config FILE"), expected, "{config}");
    }
}

#[test]
fn syntax_errors_name_the_file_and_the_line_and_show_no_value() {
    for (config, line) in [
        ("log = 'info'\npassword = hunter2\n", 2),
        ("password = 'hunter2\n", 1),
        ("a = 1\nb = 2\n[[c]\n", 3),
        ("= 'hunter2'\n", 1),
        ("password 'hunter2'\n", 1),
        ("log = \"a\u{7}\"", 1),
    ] {
        let error = Files::new(config, &[]).error("x --config FILE");
        assert!(error.starts_with(&format!("app.toml:{line}: invalid TOML: ")), "{config}: {error}");
        assert!(!error.contains("hunter2") && !error.contains('\n'), "{config}: {error}");
    }
}

#[test]
fn value_of_the_file_that_a_flag_replaces_is_checked_too() {
    let files = Files::new("drain-timeout = 'soon'\n", &[]);
    let error = files.error("x --config FILE --drain-timeout 1s --database d --password p");
    assert!(error.starts_with("app.toml:1: invalid value 'soon' for \"drain-timeout\""), "{error}");
}

#[test]
fn paths_that_are_no_regular_file_are_refused_at_once() {
    let files = Files::new("", &[]);
    let path = |name: &str| files.0.path().join(name);
    rustix::fs::mkfifoat(rustix::fs::CWD, path("fifo"), rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)
        .expect("the FIFO is made");
    std::os::unix::net::UnixListener::bind(path("socket")).expect("the socket is made");
    fs::write(path("large"), vec![b'#'; 1024 * 1024 + 1]).expect("the file is written");
    fs::write(path("binary"), b"log = \"\xff\"").expect("the file is written");
    for (name, reason) in [
        ("missing", "No such file or directory"),
        ("credentials", "it is a directory, expected a regular file"),
        ("fifo", "expected a regular file"),
        ("socket", "No such device or address"),
        ("large", "it is larger than 1 MiB"),
        ("binary", "expected UTF-8"),
    ] {
        let error = files.error(&format!("x --config {}", path(name).display()));
        assert!(error.starts_with(&format!("could not read {name} (--config): {reason}")), "{error}");
    }
    let error = files.error("x --config /dev/zero");
    assert_eq!(error, "could not read /dev/zero (--config): expected a regular file");
    fs::write(path("full"), vec![b'#'; 1024 * 1024]).expect("the file is written");
    files.options(&format!("x --config {} --database d --password p", path("full").display()));
}

#[test]
fn large_files_are_read_or_refused() {
    let deep = format!("log = {}", "[".repeat(500_000));
    let error = Files::new(&deep, &[]).error("x --config FILE");
    assert!(error.starts_with("app.toml:1: invalid TOML: "), "{error}");
    let many = format!("tag = [{}]\ndatabase = 'd'\npassword = 'p'\n", "'a',\n".repeat(200_000));
    assert_eq!(Files::new(&many, &[]).options("x --config FILE").options.tag.len(), 200_000);
    let keys: Vec<_> = (0..60_000).map(|number| format!("key{number} = 1\n")).collect();
    let keys = keys.concat();
    let error = Files::new(&keys, &[]).error("x --config FILE");
    assert!(error.starts_with("app.toml:1: unknown key \"key0\""), "{error}");
}

proptest::proptest! {
    /// Whatever the file contains, it is read or refused in one line.
    #[test]
    fn file_of_any_text_is_read_or_refused_in_one_line(text in ".{0,200}") {
        let files = Files::new(&text, &[]);
        if let Err(error) = files.read("x --config FILE") {
            let error = error.to_string();
            proptest::prop_assert!(!error.contains('\n'), "{error}");
        }
    }

    /// As above, with keys that exist.
    #[test]
    fn any_value_of_a_key_is_read_or_refused_in_one_line(
        key in "log|listen|drain-timeout|max-connections|tls-handover|verbose|level|tag|size|password|key",
        value in "('.{0,20}'|\"[a-z\\\\]{0,9}\"|-?[0-9_x.e]{1,30}|true|\\[[0-9,'a-z\\[\\]]{0,20}\\]|\\{.{0,9}\\}|[0-9:T-]{8,20})",
    ) {
        let files = Files::new(&format!("{key} = {value}\n"), &[]);
        if let Err(error) = files.read("x --config FILE") {
            let error = error.to_string();
            proptest::prop_assert!(!error.contains('\n'), "{error}");
        }
    }
}
