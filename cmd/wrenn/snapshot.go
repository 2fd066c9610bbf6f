package main

import (
	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/client"
)

func newSnapshotCmd() *cobra.Command {
	cmd := groupCmd("snapshot", "Freeze sandboxes under a name")
	addOutputFlags(cmd)
	cmd.AddCommand(
		newSnapshotCreateCmd(),
		newSnapshotListCmd("List snapshots", client.SnapshotTypeSnapshot),
		newSnapshotGetCmd(),
		newSnapshotInspectCmd(),
		newSnapshotRmCmd("Delete snapshots", completeTemplates(client.SnapshotTypeSnapshot)),
	)
	return cmd
}

func newTemplateCmd() *cobra.Command {
	cmd := groupCmd("template", "Look after what sandboxes are created from")
	cmd.Long = `Templates are what sandboxes are created from: bases, and all snapshots.`
	addOutputFlags(cmd)
	cmd.AddCommand(
		newSnapshotListCmd("List templates: bases and snapshots", ""),
		newTemplateBuildCmd(),
		newSnapshotRmCmd("Delete templates", completeTemplates("")),
	)
	return cmd
}

func newSnapshotCreateCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "create SANDBOX NAME",
		Short: "Freeze a running or paused sandbox under a name",
		Long: `Freeze a running or paused sandbox under a name. The sandbox goes back to the
state it was in. Sandboxes created from the snapshot start in the frozen state.`,
		Example: `  wrenn snapshot create 7h2k9c warm-python
  wrenn sandbox create warm-python`,
		Args:              args(cobra.ExactArgs(2)),
		ValidArgsFunction: completeFirst(completeSandboxes("")),
		RunE: func(cmd *cobra.Command, a []string) error {
			c, err := connect()
			if err != nil {
				return err
			}
			s, err := c.CreateSnapshot(cmd.Context(), a[0], a[1])
			if err != nil {
				return err
			}
			return outputOf(cmd).snapshot(s)
		},
	}
}

func newSnapshotListCmd(short, kind string) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   short,
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := connect()
			if err != nil {
				return err
			}
			var list []client.Snapshot
			for s, err := range c.Snapshots(cmd.Context(), client.ListSnapshotsOptions{Type: kind}) {
				if err != nil {
					return err
				}
				list = append(list, s)
			}
			return outputOf(cmd).snapshots(list)
		},
	}
}

func newSnapshotGetCmd() *cobra.Command {
	return &cobra.Command{
		Use:               "get NAME",
		Short:             "Show a snapshot",
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeFirst(completeTemplates("")),
		RunE: func(cmd *cobra.Command, a []string) error {
			c, err := connect()
			if err != nil {
				return err
			}
			s, err := c.GetSnapshot(cmd.Context(), a[0])
			if err != nil {
				return err
			}
			return outputOf(cmd).snapshot(s)
		},
	}
}

func newSnapshotRmCmd(short string, complete cobra.CompletionFunc) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:               "rm NAME...",
		Aliases:           []string{"delete"},
		Short:             short,
		Long:              short + ". What was made from them stays whole.",
		Args:              args(cobra.MinimumNArgs(1)),
		ValidArgsFunction: complete,
		RunE: func(cmd *cobra.Command, a []string) error {
			c, err := connect()
			if err != nil {
				return err
			}
			return removeEach(cmd, a, force, c.DeleteSnapshot)
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "do not complain about those that do not exist")
	return cmd
}
