// Offset-sidecar is a Kafka proxy for localhost that keeps the offsets and consumer groups of one application itself.
// See README.md; the rooms it is made of are in ARCHITECTURE.md.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1 // it could not run, or had to stop
	exitUsage  = 2 // flags, environment or file are wrong; nothing was touched
)

// version may be set by the linker; else it is what the Go toolchain noted.
var version = ""

func main() {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	os.Exit((&program{stdout: os.Stdout, stderr: os.Stderr, lookup: os.LookupEnv, signals: signals, exit: os.Exit, opened: limitMemory}).main(os.Args))
}

// limitMemory trades collector time for a small resident set, unless the environment says otherwise: the live heap is a
// few MB, and what is moved in bulk is spliced or pooled. It is not called before a sidecar is open: badger's first
// memtable is 10 MB that cost nothing until they are written, unless a collection before has freed memory for them, which
// Go has to clear.
func limitMemory() {
	if os.Getenv("GOGC") == "" && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetGCPercent(50)
	}
}

// program is one invocation, with what a test may replace.
type program struct {
	stdout, stderr io.Writer
	lookup         func(string) (string, bool) // environment
	signals        <-chan os.Signal
	exit           func(code int) // ends the process at once
	opened         func()         // called once a sidecar is open, before it is ready; may be nil
	started        func(*Sidecar) // told of the sidecar once it is ready; may be nil
}

// usageError is a mistake in how the program was called.
type usageError struct{ error }

// main runs the command line and gives the exit code.
func (p *program) main(args []string) int {
	err := p.app().RunContext(context.Background(), args)
	if err == nil {
		return exitOK
	}
	fmt.Fprintln(p.stderr, "offset-sidecar:", err)
	var usage usageError
	if errors.As(err, &usage) {
		return exitUsage
	}
	return exitFailed
}

func (p *program) app() *cli.App {
	return &cli.App{
		Name:            "offset-sidecar",
		Usage:           "a Kafka proxy for localhost that keeps consumer groups and their offsets itself",
		Version:         versionText(),
		HideVersion:     true,
		HideHelpCommand: true,
		Writer:          p.stdout,
		ErrWriter:       p.stderr,
		OnUsageError:    misused,
		ExitErrHandler:  func(*cli.Context, error) {}, // main prints and chooses the code
		Action:          unknownVerb,
		Description: "Each flag may also be set in the environment, as OFFSET_SIDECAR_LISTEN for --listen,\n" +
			"or in the YAML file of --config, as listen. A flag wins over the environment, the environment over the file.",
		Commands: []*cli.Command{
			{Name: "run", Usage: "stand in front of a Kafka cluster", Flags: flags("run"), Action: p.run, OnUsageError: misused},
			{Name: "dev", Usage: "the same with an embedded Kafka, to try things out: needs nothing else", Flags: flags("dev"), Action: p.dev, OnUsageError: misused},
			{Name: "config", Usage: "look at the configuration", HideHelpCommand: true, Action: unknownVerb, OnUsageError: misused, Subcommands: []*cli.Command{{
				Name: "print", Usage: "print each value of 'run' and where it comes from, as YAML for --config", Flags: flags("run"), Action: p.configPrint, OnUsageError: misused,
			}}},
			{Name: "status", Usage: "how the sidecar on this machine is, and its cluster", Flags: viewFlags(), Action: p.status, OnUsageError: misused},
			{Name: "members", Usage: "who is in its cluster: roles, lag, addresses", Flags: viewFlags(), Action: p.members, OnUsageError: misused},
			{Name: "recover", Usage: "after a majority of the voters was lost for good: go on with what one data directory has",
				Flags: append(flags("run", "data-dir", "cluster"), executeFlag, outputFlag), Action: p.recover, OnUsageError: misused},
			{Name: "version", Usage: "print the version", Action: p.printVersion, OnUsageError: misused},
		},
	}
}

// misused makes one sentence of a wrong flag, instead of a page of help that hides it.
func misused(c *cli.Context, err error, _ bool) error {
	text := err.Error()
	if name, ok := strings.CutPrefix(text, "flag provided but not defined: -"); ok {
		name = strings.TrimLeft(name, "-")
		text = fmt.Sprintf("unknown flag --%s%s", name, laterNote(name))
	}
	return usageError{fmt.Errorf("%s (see '%s --help')", text, c.Command.HelpName)}
}

func unknownVerb(c *cli.Context) error {
	if c.NArg() == 0 {
		return cli.ShowSubcommandHelp(c)
	}
	return usageError{fmt.Errorf("unknown command %q (see '%s --help')", c.Args().First(), c.App.Name)}
}

// flags makes the command line's form of the settings that a verb has, or of some of them.
func flags(verb string, only ...string) []cli.Flag {
	all := []cli.Flag{&cli.StringFlag{Name: "config", Usage: "YAML `FILE` with settings, by the names below"}}
	for i := range settings {
		s := &settings[i]
		if s.in(verb) && (len(only) == 0 || slices.Contains(only, s.name)) {
			flag := &cli.GenericFlag{Name: s.name, Usage: s.usage, Value: &flagValue{setting: s}, DefaultText: cmp.Or(s.defaultFor(verb), s.empty[verb])}
			all = append(all, settingFlag{flag, s})
		}
	}
	return all
}

// viewFlags are those of the verbs that ask a running sidecar.
func viewFlags() []cli.Flag { return append(flags("run", "admin"), outputFlag) }

// settingFlag is a flag with a help line of our own.
type settingFlag struct {
	*cli.GenericFlag
	setting *setting
}

// String is the flag's line in the help: its two columns have a tab between them.
func (f settingFlag) String() string {
	line := strings.TrimSpace("--"+f.Name+" "+f.setting.arg) + "\t" + f.Usage
	if f.DefaultText != "" {
		line += " (default: " + f.DefaultText + ")"
	}
	return line
}

// flagValue takes a flag's text as it was written; loadConfig reads it.
type flagValue struct {
	setting *setting
	values  []string
}

// IsBoolFlag lets a flag stand without a value, for true (package flag).
func (v *flagValue) IsBoolFlag() bool { return v.setting.flag }

// Set takes one occurrence of the flag. Of one that is no list the last holds.
func (v *flagValue) Set(text string) error {
	if !v.setting.list {
		v.values = v.values[:0]
	}
	v.values = append(v.values, text)
	return nil
}

// String gives the text as one value.
func (v *flagValue) String() string { return strings.Join(v.values, ",") }

// flagSource reads what the command line set.
func flagSource(c *cli.Context) source {
	return source{
		from: func(s *setting) string { return "--" + s.name },
		get: func(s *setting) (string, bool) {
			if v, ok := c.Generic(s.name).(*flagValue); ok && slices.Contains(c.LocalFlagNames(), s.name) {
				return v.String(), true
			}
			return "", false
		},
	}
}

// config reads the configuration of a verb from all its sources.
func (p *program) config(c *cli.Context, verb string) (*Config, error) {
	if c.NArg() > 0 {
		return nil, usageError{fmt.Errorf("unexpected argument %q (see '%s --help')", c.Args().First(), c.Command.HelpName)}
	}
	sources := []source{flagSource(c), envSource(p.lookup)}
	path := c.String("config")
	if path == "" {
		path, _ = p.lookup("OFFSET_SIDECAR_CONFIG")
	}
	if path != "" {
		file, err := fileSource(path, verb)
		if err != nil {
			return nil, usageError{err}
		}
		sources = append(sources, file)
	}
	config, err := loadConfig(verb, sources)
	if err != nil {
		return nil, usageError{err}
	}
	if verb == "run" && config.DataDir == "" {
		if config.DataDir, err = defaultDataDir(config.Cluster, p.lookup, os.Geteuid() == 0); err != nil {
			return nil, usageError{err}
		}
	}
	if verb == "run" {
		if err := config.fillPeers(p.lookup); err != nil {
			return nil, usageError{err}
		}
	}
	return config, nil
}

func (p *program) configPrint(c *cli.Context) error {
	config, err := p.config(c, "run")
	if err != nil {
		return err
	}
	config.print("run", func(format string, args ...any) { fmt.Fprintf(p.stdout, format, args...) })
	if err := config.validate(true); err != nil {
		return usageError{err}
	}
	return nil
}

func (p *program) printVersion(*cli.Context) error {
	fmt.Fprintln(p.stdout, "offset-sidecar", versionText())
	return nil
}

// versionText is the linker's version, or the module's, or the commit's.
func versionText() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return "devel-" + s.Value[:min(12, len(s.Value))]
		}
	}
	return "devel"
}
