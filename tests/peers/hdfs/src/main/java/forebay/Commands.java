package forebay;

import java.io.ByteArrayOutputStream;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.EnumSet;
import java.util.List;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.BlockLocation;
import org.apache.hadoop.fs.CreateFlag;
import org.apache.hadoop.fs.FSDataInputStream;
import org.apache.hadoop.fs.FSDataOutputStream;
import org.apache.hadoop.fs.FileContext;
import org.apache.hadoop.fs.FileSystem;
import org.apache.hadoop.fs.FsShell;
import org.apache.hadoop.fs.LocatedFileStatus;
import org.apache.hadoop.fs.Options;
import org.apache.hadoop.fs.RemoteIterator;
import org.apache.hadoop.fs.permission.FsAction;
import org.apache.hadoop.hdfs.DistributedFileSystem;
import org.apache.hadoop.hdfs.ReadStatistics;
import org.apache.hadoop.hdfs.client.HdfsDataInputStream;
import org.apache.hadoop.hdfs.tools.DFSAdmin;
import org.apache.hadoop.util.ToolRunner;

/**
 * Many commands of Hadoop's own shell in one process, each with a FileSystem of its own. Started by hdfs.sh commands.
 *
 * <p>Arguments: -D options as the shell takes them, then a file with one command a line, its words parted by tabs. A command is one of the
 * shell (-ls /), of dfsadmin (dfsadmin -report), or a call of the API (api NAME PATH ..). Prints for each a line `### N EXIT`, what
 * it printed, a line `--- err`, and what it printed there.
 */
public final class Commands {
  public static void main(String[] arguments) throws Exception {
    List<String> options = new ArrayList<>(Arrays.asList(arguments));
    Path file = Path.of(options.remove(options.size() - 1));
    PrintStream out = System.out;
    PrintStream err = System.err;
    int n = 0;
    for (String line : Files.readAllLines(file)) {
      String[] words = line.split("\t");
      ByteArrayOutputStream printed = new ByteArrayOutputStream();
      ByteArrayOutputStream complained = new ByteArrayOutputStream();
      System.setOut(new PrintStream(printed, true, StandardCharsets.UTF_8));
      System.setErr(new PrintStream(complained, true, StandardCharsets.UTF_8));
      int exit = run(options, words);
      System.setOut(out);
      System.setErr(err);
      out.println("### " + n++ + " " + exit);
      out.write(printed.toByteArray());
      out.println("\n--- err");
      out.write(complained.toByteArray());
      out.println();
    }
    out.flush();
    Runtime.getRuntime().halt(0);
  }

  private static int run(List<String> options, String[] words) throws Exception {
    Configuration conf = new Configuration();
    for (String option : options) {
      String[] pair = option.substring(2).split("=", 2);
      conf.set(pair[0], pair[1]);
    }
    try {
      if (words[0].equals("api")) {
        return api(conf, words);
      }
      if (words[0].equals("dfsadmin")) {
        return ToolRunner.run(conf, new DFSAdmin(), Arrays.copyOfRange(words, 1, words.length));
      }
      return ToolRunner.run(conf, new FsShell(), words);
    } finally {
      FileSystem.closeAll();
    }
  }

  private static int api(Configuration conf, String[] words) {
    try {
      DistributedFileSystem fs = (DistributedFileSystem) FileSystem.newInstance(conf);
      org.apache.hadoop.fs.Path path = new org.apache.hadoop.fs.Path(words[2]);
      switch (words[1]) {
        case "locations":
          for (BlockLocation b : fs.getFileBlockLocations(path, 0, Long.MAX_VALUE)) {
            System.out.println(b.getOffset() + "+" + b.getLength() + " hosts=" + b.getHosts().length);
          }
          break;
        case "located":
          RemoteIterator<LocatedFileStatus> all = fs.listFiles(path, true);
          while (all.hasNext()) {
            LocatedFileStatus status = all.next();
            System.out.println(status.getPath().toUri().getPath() + " " + status.getLen() + " blocks=" + status.getBlockLocations().length);
          }
          break;
        case "write":
          // path, bytes, block size, flags of hflush in between.
          try (FSDataOutputStream out = fs.create(path, true, 4096, (short) 1, Long.parseLong(words[4]))) {
            byte[] piece = new byte[1000];
            int left = Integer.parseInt(words[3]);
            for (int i = 0; left > 0; i++) {
              Arrays.fill(piece, (byte) i);
              out.write(piece, 0, Math.min(left, piece.length));
              left -= Math.min(left, piece.length);
              if (words.length > 5 && i % 7 == 3) {
                out.hflush();
              }
              if (words.length > 5 && i % 31 == 5) {
                out.hsync();
              }
            }
          }
          break;
        case "wait":
          // Says so by a file beside it, and goes on when a local file is there.
          Files.createFile(Path.of(words[2] + ".waits"));
          for (int i = 0; i < 6_000 && !Files.exists(Path.of(words[2])); i++) {
            Thread.sleep(20);
          }
          break;
        case "acknowledged":
          // path, a local file for what is acknowledged by now, block size, bytes of a piece, pieces, replicas. Byte i is i ^ i >> 8 ^ i >> 16.
          try (PrintStream said = new PrintStream(words[3]);
              FSDataOutputStream out = fs.create(path, true, 4096, Short.parseShort(words[7]), Long.parseLong(words[4]))) {
            byte[] piece = new byte[Integer.parseInt(words[5])];
            long at = 0;
            for (int i = Integer.parseInt(words[6]); i > 0; i--) {
              for (int j = 0; j < piece.length; j++, at++) {
                piece[j] = (byte) (at ^ at >> 8 ^ at >> 16);
              }
              out.write(piece);
              out.hflush();
              said.println(at);
              said.flush();
            }
            out.close();
            said.println("closed");
            said.flush();
          }
          break;
        case "pread":
          try (FSDataInputStream in = fs.open(path)) {
            byte[] piece = new byte[Integer.parseInt(words[4])];
            in.readFully(Long.parseLong(words[3]), piece);
            System.out.println(Arrays.hashCode(piece) + " " + in.getPos());
          }
          break;
        case "statistics":
          // Reads all, and tells by which way the bytes came.
          try (HdfsDataInputStream in = (HdfsDataInputStream) fs.open(path)) {
            byte[] piece = new byte[1 << 20];
            long total = 0;
            int hash = 1;
            for (int read = in.read(piece); read >= 0; read = in.read(piece)) {
              for (int i = 0; i < read; i += 997) {
                hash = 31 * hash + piece[i];
              }
              total += read;
            }
            ReadStatistics said = in.getReadStatistics();
            System.out.println(total + " read=" + said.getTotalBytesRead() + " short=" + said.getTotalShortCircuitBytesRead());
          }
          break;
        case "rename":
          fs.rename(path, new org.apache.hadoop.fs.Path(words[3]), words[4].equals("overwrite") ? Options.Rename.OVERWRITE : Options.Rename.NONE);
          break;
        case "renames":
          System.out.println(fs.rename(path, new org.apache.hadoop.fs.Path(words[3])));
          break;
        case "delete":
          System.out.println(fs.delete(path, words[3].equals("recursive")));
          break;
        case "mkdirs":
          System.out.println(fs.mkdirs(path));
          break;
        case "context":
          FileContext context = FileContext.getFileContext(conf);
          context.create(path, EnumSet.of(CreateFlag.CREATE), Options.CreateOpts.createParent()).close();
          System.out.println(context.getFileStatus(path).getLen());
          break;
        case "access":
          fs.access(path, FsAction.valueOf(words[3]));
          break;
        case "closed":
          System.out.println(fs.isFileClosed(path) + " " + fs.recoverLease(path));
          break;
        case "status":
          System.out.println(fs.exists(path) + " " + fs.getStatus().getCapacity() / Long.MAX_VALUE + " " + fs.getDefaultReplication(path));
          break;
        case "policy":
          System.out.println(fs.getStoragePolicy(path).getName());
          break;
        case "quota":
          System.out.println(fs.getQuotaUsage(path).getFileAndDirectoryCount() + " " + fs.getContentSummary(path).getFileCount());
          break;
        default:
          throw new IllegalArgumentException(words[1]);
      }
      return 0;
    } catch (Exception e) {
      String text = e.getMessage() == null ? "" : e.getMessage().split("\n")[0];
      System.err.println(e.getClass().getName() + ": " + text);
      return 1;
    }
  }
}
